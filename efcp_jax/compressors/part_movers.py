"""Rows in parts, by label or by leaf, carried to another layout on the host."""

from typing import Any

import jax
import numpy as np


class LabelledMover:
    """Moves every part by its own mover."""

    def __init__(self, movers: dict[str, Any], block_diagonal: bool) -> None:
        self.movers, self.block_diagonal = movers, block_diagonal

    def vector(self, vector: dict[str, Any]) -> dict[str, Any]:
        """Return a vector in the new layout."""
        return {k: mover.vector(vector[k]) for k, mover in self.movers.items()}

    def basis(self, basis: dict[str, Any]) -> dict[str, Any]:
        """Return what is carried between steps in the new layout."""
        return {k: self.movers[k].basis(part) for k, part in basis.items()}

    def rows(self, rows: Any) -> Any:
        """Return a window in the new layout."""
        parts = {k: mover.rows(rows.parts[k]) for k, mover in self.movers.items()}
        return type(rows)(parts, rows.ratios)

    def grams(self, grams: Any) -> Any:
        """Return what there is for every Gram matrix in the new layout."""
        if not self.block_diagonal:
            return grams
        return {k: mover.grams(grams[k]) for k, mover in self.movers.items()}


class LeafMover:
    """Moves every leaf by itself: other devices may have other groups."""

    def __init__(self, old: Any, new: Any) -> None:
        self.old, self.new = old, new
        # Group of each leaf in the old layout, and its place there.
        self.found = {
            index: (group, place)
            for group in old.groups
            for place, index in enumerate(group.indices)
        }

    def _map(self, name: str, groups: dict[str, Any]) -> dict[str, Any]:
        """Return what `name` of each leaf's mover makes of it, in the new groups.

        The devices' parts lie behind each other, and in each part the leaves.
        """
        moved: dict[str, Any] = {}
        before = self.old.layout.ways(self.old.layout.axes)
        after = self.new.layout.ways(self.new.layout.axes)
        for group in self.new.groups:
            members = []
            for index in group.indices:
                was, place = self.found[index]
                count = len(was.indices)

                def member(x: Any, count: int = count, place: int = place) -> Any:
                    parts = np.asarray(x).reshape(before, count, -1, *x.shape[1:])
                    return parts[:, place].reshape(-1, *x.shape[1:])

                own = jax.tree.map(member, groups[was.name])
                members.append(getattr(was.space.mover(group.space), name)(own))

            def stack(*arrays: Any) -> np.ndarray:
                parts = [x.reshape(after, -1, *x.shape[1:]) for x in arrays]
                return np.concatenate(parts, 1).reshape(-1, *arrays[0].shape[1:])

            moved[group.name] = jax.tree.map(stack, *members)
        return moved

    def _regrouped(self, groups: dict[str, Any]) -> dict[str, Any]:
        """Return arrays with an entry for each leaf, in the new groups."""
        moved: dict[str, Any] = {}
        for group in self.new.groups:
            found = [self.found[index] for index in group.indices]
            members = [
                jax.tree.map(lambda x, i=place: np.asarray(x[i]), groups[was.name])
                for was, place in found
            ]
            moved[group.name] = jax.tree.map(lambda *each: np.stack(each), *members)
        return moved

    def vector(self, vector: dict[str, Any]) -> dict[str, Any]:
        """Return a vector in the new layout."""
        return self._map("vector", vector)

    def basis(self, basis: None) -> None:
        """Return what is carried between steps, which is nothing."""
        return basis

    def rows(self, rows: Any) -> Any:
        """Return a window in the new layout."""
        return type(rows)(self._map("rows", rows.groups), self._regrouped(rows.ratios))

    def grams(self, grams: dict[str, Any]) -> dict[str, Any]:
        """Return what there is for every Gram matrix in the new layout."""
        return self._regrouped(grams)

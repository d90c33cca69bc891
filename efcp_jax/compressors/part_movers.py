"""Rows in parts, by label or by leaf, carried to another layout on the host."""

import functools
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
        self.groups = new.groups
        self.before, self.after = (s.layout.ways(s.layout.axes) for s in (old, new))
        # Group of each leaf in the old layout, and its place there.
        self.found = {
            index: (group, place)
            for group in old.groups
            for place, index in enumerate(group.indices)
        }
        # Leaves that are alike here and there are moved alike.
        self.movers: dict[tuple[str, str], Any] = {}
        for group in self.groups:
            for was in (self.found[index][0] for index in group.indices):
                pair = was.name, group.name
                if pair not in self.movers:
                    self.movers[pair] = was.space.mover(group.space)

    def _map(self, name: str, groups: dict[str, Any]) -> dict[str, Any]:
        """Return what `name` of each leaf's mover makes of it, in the new groups.

        The devices' parts lie behind each other, and in each part the leaves.
        """

        def divide(count: int, x: Any) -> np.ndarray:
            parts = np.asarray(x).reshape(self.before, count, -1, *x.shape[1:])
            return parts.swapaxes(0, 1).reshape(count, -1, *x.shape[1:])

        def join(x: np.ndarray) -> np.ndarray:
            parts = x.reshape(len(x), self.after, -1, *x.shape[2:])
            return parts.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        divided = {
            was.name: jax.tree.map(
                functools.partial(divide, len(was.indices)), groups[was.name]
            )
            for was, _ in self.found.values()
        }
        move = lambda pair, one: getattr(self.movers[pair], name)(one)
        return jax.tree.map(join, self._regrouped(divided, move))

    def _regrouped(self, groups: dict[str, Any], move: Any) -> dict[str, Any]:
        """Return `move(names, one)` of each leaf's entries, in the new groups."""
        moved: dict[str, Any] = {}
        for group in self.groups:
            members = []
            for was, place in (self.found[index] for index in group.indices):
                take = lambda x, place=place: np.asarray(x[place])
                one = jax.tree.map(take, groups[was.name])
                members.append(move((was.name, group.name), one))
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
        return type(rows)(self._map("rows", rows.groups), self.grams(rows.ratios))

    def grams(self, grams: dict[str, Any]) -> dict[str, Any]:
        """Return what there is for every Gram matrix in the new layout."""
        return self._regrouped(grams, lambda _, one: one)

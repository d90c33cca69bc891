"""Parts carried to another layout on the host.

Other devices may have other parts: leaves may be alike here and not there. So what is
alike is moved one by one, the members of a part and the leaves of a batch.
"""

import functools
from typing import Any

import jax
import numpy as np

from efcp_jax.devices import positions
from efcp_jax.devices.positions import inverse, take


class PartMover:
    """Moves every unit, a member or a leaf of a batch, by the mover of its space."""

    def __init__(self, old: Any, new: Any) -> None:
        self.old, self.new = old, new
        self.was, self.now = _places(old.parts), _places(new.parts)
        kinds = [
            {unit: type(part.space) for unit, (part, *_) in found.items()}
            for found in (self.was, self.now)
        ]
        if kinds[0] != kinds[1]:
            of = [tuple((p.name, p.members) for p in s.parts) for s in (old, new)]
            raise ValueError(
                f"`source` and `target` label parameters differently: {of[0]} and"
                f" {of[1]}."
            )
        # Units that are alike here and there are moved alike.
        self.mover = functools.cache(self._mover)

    def _mover(self, was: str, now: str) -> Any:
        old, new = (
            next(part.space for part in space.parts if part.name == name)
            for space, name in ((self.old, was), (self.new, now))
        )
        return old.mover(new)

    def _map(self, kind: str, arrays: dict[str, Any], divided: bool) -> dict[str, Any]:
        """Return what the method `kind` of movers makes of the arrays of each unit.

        Args:
            kind: The name of the method.
            arrays: What there is for the old parts, by name.
            divided: Whether the first axis of members is divided among devices.
        """
        moved: dict[str, list[Any]] = {}
        for unit, (now, *_) in self.now.items():
            was, place, _ = self.was[unit]
            if was.name not in arrays:
                continue
            ways = _ways(self.old, was) if divided else 1
            cut = functools.partial(_cut, place, len(_units(was)), ways)
            one = jax.tree.map(cut, arrays[was.name])
            one = getattr(self.mover(was.name, now.name), kind)(one)
            moved.setdefault(now.name, []).append(one)
        ways = {p.name: _ways(self.new, p) if divided else 1 for p in self.new.parts}
        return {
            name: jax.tree.map(functools.partial(_together, ways[name]), *each)
            for name, each in moved.items()
        }

    def vector(self, vector: dict[str, Any]) -> dict[str, Any]:
        """Return a vector in the new layout."""
        return self._map("vector", vector, True)

    def basis(self, basis: dict[str, Any]) -> dict[str, Any]:
        """Return what is carried between steps in the new layout."""
        return self._map("basis", basis, True)

    def rows(self, rows: Any) -> Any:
        """Return a window in the new layout."""
        # All batches have one scale, so any leaf tells the ratio of its batch.
        index = {row: self.was[unit][2] for unit, (_, _, row) in self.now.items()}
        ratios = np.asarray(rows.ratios)[[index[row] for row in sorted(index)]]
        return type(rows)(self._map("rows", rows.parts, True), ratios)

    def grams(self, grams: Any) -> Any:
        """Return what there is for every Gram matrix in the new layout."""
        return self._map("grams", grams, False) if self.new.block_diagonal else grams


def _places(parts: Any) -> dict[tuple[int, ...], tuple[Any, int, int]]:
    """Return the part of every unit, its place there and the row of its ratios."""
    found, rows = {}, 0
    for part in parts:
        for i, unit in enumerate(_units(part)):
            found[unit] = part, i, rows if _is_batch(part) else rows + i
        rows += len(part.members)
    return found


def _is_batch(part: Any) -> bool:
    return isinstance(part.space.counts, int)


def _units(part: Any) -> tuple[tuple[int, ...], ...]:
    """Return the leaves of a batch, each as a member, or the members."""
    return tuple((i,) for i in part.members[0]) if _is_batch(part) else part.members


def _ways(space: Any, part: Any) -> int:
    """Return among how many devices the first axis of the arrays is divided."""
    return 1 if _is_batch(part) else space.layout.ways(space.layout.axes)


def _cut(place: int, count: int, ways: int, x: Any) -> np.ndarray:
    """Return the array of one of `count` units, which lie side by side on a device."""
    x = np.asarray(x)
    if count == 1:
        return x
    parts = x.reshape(ways, count, -1, *x.shape[1:])
    return parts[:, place].reshape(-1, *x.shape[1:])


def _together(ways: int, *each: np.ndarray) -> np.ndarray:
    """Undo `_cut`."""
    if len(each) == 1:
        return each[0]
    parts = [x.reshape(ways, -1, *x.shape[1:]) for x in each]
    return np.concatenate(parts, axis=1).reshape(-1, *each[0].shape[1:])


class FactorMover:
    """Moves the rows and columns of thin factors."""

    def __init__(self, old: Any, new: Any) -> None:
        was, now = (
            positions.of_matrix(space.matrix, space.layout.leaves[0], space.layout)
            for space in (old, new)
        )
        pairs = zip(was, now, strict=True)
        self.index = [inverse(before)[after] for before, after in pairs]

    def vector(self, vector: Any) -> np.ndarray:
        """Return a vector in the new layout."""
        rows, cols = self.index
        return take(take(vector, rows, 1), cols, 2)

    def basis(self, basis: Any) -> np.ndarray:
        """Return what is carried between steps in the new layout."""
        return take(basis, self.index[1], 2)

    def rows(self, rows: Any) -> Any:
        """Return a window in the new layout."""
        pairs = zip(rows, self.index, strict=True)
        return type(rows)(*(take(side, index, 2) for side, index in pairs))

    def grams(self, grams: Any) -> Any:
        """Return what there is for every Gram matrix, as it is."""
        return grams

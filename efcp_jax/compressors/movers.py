"""What spaces keep, carried from one layout of devices to another, on the host.

Leaves that are alike here may not be there, so what is side by side is moved one by
one: the members of a part, and the leaves of a batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efcp_jax.devices.positions import inverse, of_blocks, of_matrix, take
from efcp_jax.passes.entries import LIMITS, ScaledRow, SparseRow, Storage, Stored


class DenseMover:
    """Moves vectors of blocks, and rows that are such vectors."""

    def __init__(self, old: Any, new: Any) -> None:
        was, now = map(of_blocks, (old, new))
        # Where each new position was.
        self.shape, self.source = was.shape, inverse(was)[now]

    def vector(self, array: Any) -> np.ndarray:  # noqa: D102
        flat = take(np.asarray(array).reshape(-1), self.source.reshape(-1), 0)
        return flat.reshape(self.source.shape)

    def rows(self, rows: Any) -> Any:  # noqa: D102
        each = map(self.vector, np.moveaxis(np.asarray(rows), 1, 0))
        return np.stack([*each], axis=1)

    def grams(self, grams: Any) -> Any:  # noqa: D102
        return grams


class SparseMover(DenseMover):
    """Moves vectors of blocks, and kept entries of them."""

    def __init__(self, old: Any, new: Any) -> None:
        super().__init__(old, new)
        self.old, self.new = old, new

    def rows(self, rows: Stored) -> Any:  # noqa: D102
        old, new, kept = self.old.passes, self.new.passes, self.new.passes.kept
        values, offsets = (
            x.reshape(len(x), -1, old.kept, *x.shape[2:])
            for x in _load(rows, old.storage)
        )
        shape = len(self.source), values.shape[1], kept, *self.source.shape[2:]
        new_values, new_offsets = np.zeros(shape, values.dtype), np.zeros(shape, int)
        for row in range(values.shape[1]):
            dense = np.zeros(self.shape, values.dtype)
            at = unit, _, *lane = np.nonzero(values[:, row])
            dense[unit, offsets[:, row][at], *lane] = values[:, row][at]
            moved = self.vector(dense)
            ranks = np.cumsum(moved != 0, axis=1, dtype=np.int32) - 1
            if (most := ranks.max(initial=-1)) >= kept:
                raise ValueError(
                    "The blocks of `top_k` hold other entries in the new layout, and"
                    f" {most + 1} kept entries of one row fall into a block with"
                    f" room for {kept}. Go on with the layout that the state was saved"
                    " in, or start the optimizer afresh with `init`."
                )
            at = unit, offset, *lane = np.nonzero(moved)
            place = unit, row, ranks[at], *lane
            new_values[place], new_offsets[place] = moved[at], offset
        both = new_values, new_offsets
        values, offsets = (x.reshape(len(x), -1, *x.shape[3:]) for x in both)
        return _store(values, offsets, new.storage, kept)


def _load(stored: Stored, storage: Storage) -> tuple[np.ndarray, np.ndarray]:
    """Do what `Storage.load` does, in NumPy."""
    if isinstance(stored, ScaledRow):
        scales, values = (np.asarray(x) for x in (stored.scales, stored.values))
        each = np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)
        values = values.astype(np.float32) * each.astype(np.float32)[:, :, None]
        return values, np.asarray(stored.offsets)
    if isinstance(stored, SparseRow):
        return np.asarray(stored.values), np.asarray(stored.offsets)
    words = np.asarray(stored)
    return words.astype(np.uint16).view(storage.values), words >> 16


def _store(values: np.ndarray, offsets: np.ndarray, storage: Storage, kept: int) -> Any:
    """Do what `Storage.store` does, in NumPy, to the rows of a window."""
    if storage.words:
        return offsets.astype(np.uint32) << 16 | values.view(np.uint16)
    offsets = offsets.astype(storage.offsets)
    if not storage.scaled:
        return SparseRow(values, offsets)  # pyright: ignore
    values, scales = _quantise(values, storage.values, kept)
    return ScaledRow(values, offsets, scales)  # pyright: ignore


def _quantise(
    values: np.ndarray, dtype: np.dtype, kept: int
) -> tuple[np.ndarray, np.ndarray]:
    """Do what `entries.quantise` does; what is of the same tile stays as it was."""
    most, above = LIMITS[dtype.name]
    rows = values.reshape(len(values), -1, kept, values.shape[2])
    peak = np.max(np.abs(rows), axis=(2, 3))
    _, exponent = np.frexp(np.where(np.isfinite(peak), peak / above, 0))
    scales = np.where(peak > 0, np.ldexp(np.float32(1), exponent), np.float32(0))
    inverse = np.divide(1, scales, where=scales > 0, out=np.zeros_like(scales))
    scaled = np.clip(rows * inverse[:, :, None, None], -most, most)
    if np.issubdtype(dtype, np.integer):
        scaled = np.rint(scaled)
    scales = np.where(np.isfinite(peak), scales, np.nan)
    return scaled.reshape(values.shape).astype(dtype), scales.astype(jnp.bfloat16)


class FactorMover:
    """Moves the rows and columns of thin factors."""

    def __init__(self, old: Any, new: Any) -> None:
        was, now = (of_matrix(space.layout) for space in (old, new))
        pairs = zip(was, now, strict=True)
        self.index = [inverse(before)[after] for before, after in pairs]

    def vector(self, vector: Any) -> np.ndarray:  # noqa: D102
        rows, cols = self.index
        return take(take(vector, rows, 1), cols, 2)

    def basis(self, basis: Any) -> np.ndarray:  # noqa: D102
        return take(basis, self.index[1], 2)

    def rows(self, rows: Any) -> Any:  # noqa: D102
        pairs = zip(rows, self.index, strict=True)
        return type(rows)(*(take(side, index, 2) for side, index in pairs))

    grams = DenseMover.grams


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
            was, now = ([(p.name, p.members) for p in s.parts] for s in (old, new))
            raise ValueError(
                f"`source` and `target` label parameters differently: {was} and {now}."
            )
        # Units that are alike here and there are moved alike.
        pairs = [(self.was[unit][0], part) for unit, (part, *_) in self.now.items()]
        alike = {(was.name, now.name): (was.space, now.space) for was, now in pairs}
        self.movers = {names: was.mover(now) for names, (was, now) in alike.items()}

    def _map(self, kind: str, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return what the method `kind` of movers makes of the arrays of each unit."""

        def ways(space: Any, part: Any) -> int:
            # Members lie side by side on each device; of Gram matrices all have all.
            whole = part.alone or kind == "grams"
            return 1 if whole else space.layout.ways(space.layout.axes)

        moved: dict[str, list[Any]] = {}
        for unit, (now, *_) in self.now.items():
            was, place, count, _ = self.was[unit]
            if was.name in arrays:  # which a basis may not be
                cut = functools.partial(_cut, place, count, ways(self.old, was))
                move = getattr(self.movers[was.name, now.name], kind)
                one = move(jax.tree.map(cut, arrays[was.name]))
                moved.setdefault(now.name, []).append(one)
        return {
            p.name: jax.tree.map(
                functools.partial(_together, ways(self.new, p)), *moved[p.name]
            )
            for p in self.new.parts
            if p.name in moved
        }

    def vector(self, vector: dict[str, Any]) -> dict[str, Any]:  # noqa: D102
        return self._map("vector", vector)

    def basis(self, basis: dict[str, Any]) -> dict[str, Any]:  # noqa: D102
        return self._map("basis", basis)

    def rows(self, rows: Any) -> Any:  # noqa: D102
        # All batches have one scale, so any leaf tells the ratio of its batch.
        index = {row: self.was[unit][-1] for unit, (*_, row) in self.now.items()}
        ratios = np.asarray(rows.ratios)[[index[row] for row in sorted(index)]]
        return rows._replace(parts=self._map("rows", rows.parts), ratios=ratios)

    def grams(self, grams: Any) -> Any:  # noqa: D102
        return self._map("grams", grams) if self.new.block_diagonal else grams


def _places(parts: Any) -> dict[tuple[int, ...], tuple[Any, int, int, int]]:
    """Return the part of every unit, its place among how many, its row of ratios."""
    found, rows = {}, 0
    for part in parts:
        batch = isinstance(part.space.counts, int)
        units = [(i,) for i in part.members[0]] if batch else part.members
        for i, unit in enumerate(units):
            found[unit] = part, i, len(units), rows if batch else rows + i
        rows += len(part.members)
    return found


def _cut(place: int, count: int, ways: int, x: Any) -> np.ndarray:
    """Return the array of one of `count` units, which lie side by side on a device."""
    x = np.asarray(x)
    parts = x.reshape(ways, count, -1, *x.shape[1:])
    return parts[:, place].reshape(-1, *x.shape[1:])


def _together(ways: int, *each: np.ndarray) -> np.ndarray:
    """Undo `_cut`."""
    parts = [x.reshape(ways, -1, *x.shape[1:]) for x in each]
    return np.concatenate(parts, axis=1).reshape(-1, *each[0].shape[1:])

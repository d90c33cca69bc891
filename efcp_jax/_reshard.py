"""Moving the arrays of a state from one layout to another, on the host."""

from typing import Any

import jax
import numpy as np

from efcp_jax import _positions as positions
from efcp_jax._description import Description
from efcp_jax.compressors._entries import SparseRow, Storage, Stored
from efcp_jax.compressors.identity import IdentitySpace
from efcp_jax.compressors.low_rank import LowRankRow, LowRankSpace
from efcp_jax.compressors.top_k import SparseSpace


def convert(state: Any, source: Description, target: Description) -> Any:
    """Return `state`, made for the layout of `source`, in that of `target`.

    Raises:
        ValueError: They differ in more than the layout, or kept entries do not fit.
    """
    _check(state, source, target)
    old, new = source.space, target.space
    mover = _Factors(old, new) if isinstance(old, LowRankSpace) else _Blocks(old, new)
    fields = {
        "error": None if state.error is None else mover.vector(state.error),
        "basis": None if state.basis is None else mover.basis(state.basis),
    }
    if hasattr(state, "window"):
        rows = mover.rows(state.window.rows)
        fields["window"] = state.window._replace(rows=rows)
    return state._replace(**fields)


def _check(state: Any, source: Description, target: Description) -> None:
    """Raise unless the two states differ in their layout only."""
    structures = [_structure(each) for each in (source, target)]
    if structures[0] != structures[1]:
        raise ValueError(
            "`source` and `target` make states of different structure:"
            f" {structures[0]} and {structures[1]}."
        )
    pairs = zip(jax.tree.leaves(source.arrays), jax.tree.leaves(state), strict=True)
    for made, received in pairs:
        if made.shape != np.shape(received):
            raise ValueError(
                f"`state` was not made for `source`: it has an array of shape"
                f" {np.shape(received)} where `source` makes {made.shape}."
            )
    whole = lambda layout: [
        tuple(
            n * layout.ways(axes)
            for n, axes in zip(leaf.shape, leaf.partition, strict=True)
        )
        for leaf in layout.leaves
    ]
    shapes = [whole(each.space.layout) for each in (source, target)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`source` and `target` have parameters of different shapes: {shapes[0]}"
            f" and {shapes[1]}."
        )


def _structure(description: Description) -> Any:
    """Return the structure of the state, whichever way entries are stored."""
    arrays, space = description.arrays, description.space
    if isinstance(space, SparseSpace) and hasattr(arrays, "window"):
        arrays = arrays._replace(window=arrays.window._replace(rows=None))
    return type(space), jax.tree.structure(arrays)


def _inverse(places: np.ndarray) -> np.ndarray:
    """Return where each position is in `places`, -1 where it is not."""
    flat = places.reshape(-1)
    inverse = np.full(flat.max(initial=-1) + 2, -1, np.int64)
    held = flat >= 0
    inverse[flat[held]] = np.flatnonzero(held)
    return inverse


def _take(array: Any, index: np.ndarray, axis: int) -> np.ndarray:
    """Take `index` along `axis`, with zeros where it is negative."""
    array = np.asarray(array)
    taken = array.take(np.maximum(index, 0), axis=axis)
    shape = [1] * taken.ndim
    shape[axis] = index.size
    return np.where(index.reshape(shape) >= 0, taken, np.zeros((), array.dtype))


def _load(stored: Stored, storage: Storage) -> tuple[np.ndarray, np.ndarray]:
    """Do what `Storage.load` does on the host."""
    if isinstance(stored, SparseRow):
        return np.asarray(stored.values), np.asarray(stored.offsets)
    words = np.asarray(stored)
    return words.astype(np.uint16).view(storage.values), words >> 16


def _store(values: np.ndarray, offsets: np.ndarray, storage: Storage) -> Any:
    """Do what `Storage.store` does on the host."""
    if not storage.words:
        return SparseRow(values, offsets.astype(storage.offsets))  # pyright: ignore
    return offsets.astype(np.uint32) << 16 | values.view(np.uint16)


class _Blocks:
    """Dense and sparse rows."""

    def __init__(self, old: IdentitySpace | SparseSpace, new: Any) -> None:
        self.old, self.new = old, new
        self.old_places = positions.of_blocks(old.blocks)
        self.new_places = positions.of_blocks(new.blocks)
        self.inverse = _inverse(self.old_places)
        # Where each new position was, and which whole block each new block was.
        self.source = self.inverse[self.new_places]
        self.blocks = self._same_blocks(old, new)

    def _same_blocks(self, old: Any, new: Any) -> np.ndarray | None:
        alike = self.old_places.shape[1] == self.new_places.shape[1]
        if not alike or getattr(old, "kept", None) != getattr(new, "kept", None):
            return None
        known = {row.tobytes(): i for i, row in enumerate(self.old_places)}
        found = [
            -1 if row.max(initial=-1) < 0 else known.get(row.tobytes(), -2)
            for row in self.new_places
        ]
        return None if -2 in found else np.asarray(found)

    def vector(self, array: Any) -> np.ndarray:
        flat = _take(np.asarray(array).reshape(-1), self.source.reshape(-1), 0)
        return flat.reshape(self.new_places.shape)

    def basis(self, basis: Any) -> Any:
        return basis

    def rows(self, rows: Any) -> Any:
        if (blocks := self.blocks) is not None:
            return jax.tree.map(lambda leaf: _take(leaf, blocks, 0), rows)
        if isinstance(self.old, SparseSpace):
            return self._sparse(rows, self.old.storage)
        rows = np.asarray(rows)
        return np.stack([self.vector(rows[:, i]) for i in range(rows.shape[1])], axis=1)

    def _sparse(self, rows: Stored, storage: Storage) -> Stored:
        values, offsets = _load(rows, storage)
        size, kept = values.shape[1], self.new.kept
        shape = (self.new_places.shape[0], size, kept)
        new_values, new_offsets = np.zeros(shape, values.dtype), np.zeros(shape, int)
        for row in range(size):
            dense = np.zeros(self.old_places.shape, values.dtype)
            at = offsets[:, row].astype(np.int64)
            np.put_along_axis(dense, at, values[:, row], axis=1)
            moved = self.vector(dense)
            block, offset = np.nonzero(moved)
            starts = np.searchsorted(block, np.arange(shape[0]))
            rank = np.arange(block.size) - starts[block]
            if rank.max(initial=-1) >= kept:
                raise ValueError(
                    "The blocks of `top_k` hold other entries in the new layout, and"
                    f" {rank.max() + 1} kept entries of one row fall into a block with"
                    f" room for {kept}. Go on with the layout that the state was saved"
                    " in, or start the optimizer afresh with `init`."
                )
            new_values[block, row, rank] = moved[block, offset]
            new_offsets[block, row, rank] = offset
        return _store(new_values, new_offsets, self.new.storage)


class _Factors:
    """Low-rank rows: every array is moved along its rows and its columns."""

    def __init__(self, old: LowRankSpace, new: LowRankSpace) -> None:
        self.treedef = new.layout.treedef
        self.moves = []
        for index, (before, after) in enumerate(
            zip(old.matrices, new.matrices, strict=True)
        ):
            pairs = zip(
                positions.of_matrix(before, old.layout.leaves[index], old.layout),
                positions.of_matrix(after, new.layout.leaves[index], new.layout),
                strict=True,
            )
            self.moves.append([_inverse(was)[now] for was, now in pairs])
        self.whole = [matrix.whole for matrix in new.matrices]

    def _map(self, function: Any, tree: Any) -> Any:
        leaves = self.treedef.flatten_up_to(tree)
        results = map(function, self.moves, self.whole, leaves)
        return self.treedef.unflatten(list(results))

    def vector(self, tree: Any) -> Any:
        return self._map(
            lambda move, _, leaf: _take(_take(leaf, move[0], 0), move[1], 1), tree
        )

    def basis(self, tree: Any) -> Any:
        return self._map(
            lambda move, whole, leaf: leaf if whole else _take(leaf, move[1], 0), tree
        )

    def rows(self, rows: LowRankRow) -> LowRankRow:
        side = lambda i, tree: self._map(lambda m, _, leaf: _take(leaf, m[i], 0), tree)
        return LowRankRow(side(0, rows.left), side(1, rows.right))

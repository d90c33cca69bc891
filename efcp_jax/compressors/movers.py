"""Rows carried from one layout of the devices to another, on the host.

A mover is made by a space for another space of its kind, and moves vectors, bases and
the rows of windows, whole arrays of NumPy.
"""

from typing import Any

import jax
import numpy as np

from efcp_jax.compressors.blocks import Blocks
from efcp_jax.devices import positions
from efcp_jax.devices.positions import inverse, take
from efcp_jax.passes.entries import SparseRow, Storage, Stored


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


class DenseMover:
    """Moves vectors of blocks, and rows that are such vectors."""

    def __init__(self, old: Blocks, new: Blocks) -> None:
        self.old_places = positions.of_blocks(old)
        self.new_places = positions.of_blocks(new)
        # Where each new position was.
        self.source = inverse(self.old_places)[self.new_places]

    def same_blocks(self) -> np.ndarray | None:
        """Return which whole block each new block was; None if entries are mixed."""
        if self.old_places.shape[1] != self.new_places.shape[1]:
            return None
        known = {row.tobytes(): i for i, row in enumerate(self.old_places)}
        found = [
            -1 if row.max(initial=-1) < 0 else known.get(row.tobytes(), -2)
            for row in self.new_places
        ]
        return None if -2 in found else np.asarray(found)

    def vector(self, array: Any) -> np.ndarray:
        """Return a vector in the new layout."""
        flat = take(np.asarray(array).reshape(-1), self.source.reshape(-1), 0)
        return flat.reshape(self.new_places.shape)

    def basis(self, basis: Any) -> Any:
        """Return what is carried between steps, which is nothing."""
        return basis

    def rows(self, rows: Any) -> Any:
        """Return a window in the new layout."""
        rows = np.asarray(rows)
        return np.stack([self.vector(rows[:, i]) for i in range(rows.shape[1])], axis=1)


class SparseMover:
    """Moves kept entries, by whole blocks where blocks are the same in both layouts."""

    def __init__(self, old: Any, new: Any) -> None:
        self.old, self.new = old, new
        self.dense = DenseMover(old.blocks, new.blocks)
        self.blocks = self.dense.same_blocks() if old.kept == new.kept else None
        self.vector, self.basis = self.dense.vector, self.dense.basis

    def rows(self, rows: Stored) -> Any:
        """Return a window in the new layout."""
        if (blocks := self.blocks) is not None:
            return jax.tree.map(lambda leaf: take(leaf, blocks, 0), rows)
        values, offsets = _load(rows, self.old.storage)
        places, kept = self.dense.old_places, self.new.kept
        shape = (self.dense.new_places.shape[0], values.shape[1], kept)
        new_values, new_offsets = np.zeros(shape, values.dtype), np.zeros(shape, int)
        for row in range(values.shape[1]):
            dense = np.zeros(places.shape, values.dtype)
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


class FactorMover:
    """Moves factors, every array along its rows and its columns."""

    def __init__(self, old: Any, new: Any) -> None:
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
            self.moves.append([inverse(was)[now] for was, now in pairs])
        self.whole = [matrix.whole for matrix in new.matrices]

    def _map(self, function: Any, tree: Any) -> Any:
        leaves = self.treedef.flatten_up_to(tree)
        results = map(function, self.moves, self.whole, leaves)
        return self.treedef.unflatten(list(results))

    def vector(self, tree: Any) -> Any:
        """Return a vector in the new layout."""
        return self._map(
            lambda move, _, leaf: take(take(leaf, move[0], 0), move[1], 1), tree
        )

    def basis(self, tree: Any) -> Any:
        """Return what is carried between steps in the new layout."""
        return self._map(
            lambda move, whole, leaf: leaf if whole else take(leaf, move[1], 0), tree
        )

    def rows(self, rows: Any) -> Any:
        """Return a window in the new layout."""
        side = lambda i, tree: self._map(lambda m, _, leaf: take(leaf, m[i], 0), tree)
        return type(rows)(side(0, rows.left), side(1, rows.right))

"""Blocks carried from one layout of the devices to another, on the host."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from efcp_jax.compressors.blocks import Blocks
from efcp_jax.devices import positions
from efcp_jax.devices.positions import inverse, take
from efcp_jax.passes.entries import LIMITS, ScaledRow, SparseRow, Storage, Stored


def _load(stored: Stored, storage: Storage) -> tuple[np.ndarray, np.ndarray]:
    """Do what `Storage.load` does on the host."""
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
    """Do what `Storage.store` does on the host, to the rows of a window."""
    if storage.scaled:
        values, scales = _quantise(values, storage.values, kept)
        offsets = offsets.astype(storage.offsets)
        return ScaledRow(values, offsets, scales)  # pyright: ignore
    if not storage.words:
        return SparseRow(values, offsets.astype(storage.offsets))  # pyright: ignore
    return offsets.astype(np.uint32) << 16 | values.view(np.uint16)


def _quantise(
    values: np.ndarray, dtype: np.dtype, kept: int
) -> tuple[np.ndarray, np.ndarray]:
    """Do what `entries.quantise` does on the host.

    What comes from the same tile comes back as it was.
    """
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

    def rows(self, rows: Any) -> Any:
        """Return a window in the new layout."""
        rows = np.asarray(rows)
        return np.stack([self.vector(rows[:, i]) for i in range(rows.shape[1])], axis=1)

    def grams(self, grams: Any) -> Any:
        """Return what there is one of for all parameters."""
        return grams


class SparseMover:
    """Moves kept entries, by whole blocks where blocks are the same in both layouts."""

    def __init__(self, old: Any, new: Any) -> None:
        self.old, self.new = old, new
        self.dense = DenseMover(old.blocks, new.blocks)
        alike = old.passes.kept == new.passes.kept
        self.blocks = self.dense.same_blocks() if alike else None
        self.vector, self.grams = self.dense.vector, self.dense.grams

    def rows(self, rows: Stored) -> Any:
        """Return a window in the new layout."""
        old, new = self.old.passes, self.new.passes
        values, offsets = (
            old.blocks(x).reshape(-1, x.shape[1] // old.kept, old.kept)
            for x in _load(rows, self.old.storage)
        )
        if (blocks := self.blocks) is not None:
            values, offsets = take(values, blocks, 0), take(offsets, blocks, 0)
            return self._stored(values, offsets)
        places, kept = self.dense.old_places, new.kept
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
        return self._stored(new_values, new_offsets)

    def _stored(self, values: np.ndarray, offsets: np.ndarray) -> Any:
        """Return entries `(blocks, m, k)` as the new space keeps them."""
        put = self.new.passes.from_blocks
        return _store(put(values), put(offsets), self.new.storage, self.new.passes.kept)

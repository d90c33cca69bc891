"""Rows of kept entries: the arithmetic of the sparse representation."""

import dataclasses
import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.compressors.blocks import Blocks
from efcp_jax.compressors.movers import SparseMover
from efcp_jax.devices.layout import Layout
from efcp_jax.numerics import saturate
from efcp_jax.passes import chunks
from efcp_jax.passes.bisection import largest
from efcp_jax.passes.entries import SparseRow, Storage, Stored


@dataclasses.dataclass(frozen=True)
class SparseSpace:
    """Rows `(blocks, k)`, windows `(blocks, m, k)`; global top-k is one block."""

    blocks: Blocks
    kept: int
    storage: Storage

    @property
    def layout(self) -> Layout:  # noqa: D102
        return self.blocks.layout

    def pack(self, tree: chex.ArrayTree) -> jax.Array:  # noqa: D102
        return self.blocks.pack(tree)

    def unpack(self, vector: jax.Array) -> chex.ArrayTree:  # noqa: D102
        return self.blocks.unpack(vector)

    def zeros(self) -> tuple[jax.Array, Stored, None]:  # noqa: D102
        count, size = self.blocks.count, self.blocks.size
        vector = jnp.zeros((count, size), self.layout.dtype)
        return vector, self.storage.zeros((count, self.kept)), None

    def specs(self):  # noqa: D102
        spec: Any = self.blocks.spec
        return spec, self.storage.pair(spec), None

    def accumulate(self, tree, vector, accept):  # noqa: D102
        return self.blocks.accumulate(tree, vector, accept)

    def compress(self, vector: jax.Array, basis: None, factor: chex.Numeric = 1.0):  # noqa: D102
        del basis
        # The same entries are largest whatever the factor.
        offsets = largest(vector, self.kept)
        values = jnp.take_along_axis(vector, offsets, axis=1) * factor
        return self.storage.store(values, offsets), None

    def _load(self, stored: Stored) -> tuple[jax.Array, jax.Array]:
        return self.storage.load(stored, self.layout.dtype)

    def expand(self, row: Stored) -> jax.Array:  # noqa: D102
        values, offsets = self._load(row)
        return chunks.scatter_add(self.blocks.size, offsets, values)

    def residual(self, vector: jax.Array, row: Stored, scale: jax.Array):  # noqa: D102
        values, offsets = self._load(row)
        # k entries a block change, so the vector is updated where it lies. Rounded up,
        # the largest ones may overflow.
        block = jnp.arange(self.blocks.count, dtype=jnp.int32)[:, None]
        taken = saturate(scale * values, vector.dtype)
        return vector.at[block, offsets.astype(jnp.int32)].add(
            -taken, unique_indices=True
        )

    def inner(self, window: Stored, row: Stored) -> jax.Array:  # noqa: D102
        values, offsets = self._load(row)
        shared = SparseRow(self.blocks.share(values), offsets)
        return chunks.inner(window, shared, self.blocks.size, self._load)

    def combine(self, window: Stored, coefficients: jax.Array):  # noqa: D102
        def place(vector: jax.Array, block: Any, sums: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(vector, sums, block, axis=0)

        count, size = self.blocks.count, self.blocks.size
        zeros = jnp.zeros((count, size), coefficients.dtype)
        blocks = range(count)
        return chunks.combine(
            window, coefficients, size, self._load, blocks, zeros, place
        )

    def update(self, window: Stored, coefficients: jax.Array):  # noqa: D102
        if not self.blocks.flat:
            return self.unpack(self.combine(window, coefficients))
        return self.blocks.tree(functools.partial(self._entries, window, coefficients))

    def _entries(
        self,
        window: Stored,
        coefficients: jax.Array,
        start: int,
        stop: int,
        zero: jax.Array,
    ) -> jax.Array:
        """Return the entries `start` to `stop` of `combine`, laid end to end."""
        size = self.blocks.size
        combine = functools.partial(
            chunks.combine, window, coefficients, size, self._load
        )

        def place(out: jax.Array, block: Any, sums: jax.Array) -> jax.Array:
            at = block * size - start
            return lax.dynamic_update_slice_in_dim(out, sums.reshape(-1), at, axis=0)

        def part(block: int, start: int, stop: int) -> jax.Array:
            nothing = jnp.zeros((1, size), self.layout.dtype)
            sums = combine(range(block, block + 1), nothing, lambda _, __, sums: sums)
            return sums[0, start - block * size : stop - block * size]

        # Blocks that lie between start and stop as a whole; parts of the one before
        # them and of the one behind may be left.
        first, last = -(-start // size), stop // size
        if first > last:
            return zero + part(last, start, stop)
        out = jnp.full(stop - start, zero)
        if start < first * size:
            head = part(first - 1, start, first * size)
            out = out.at[: len(head)].set(head)
        if last * size < stop:
            tail = part(last, last * size, stop)
            out = out.at[len(out) - len(tail) :].set(tail)
        return combine(range(first, last), out, place) if first < last else out

    def grams(self, value: jax.Array) -> jax.Array:  # noqa: D102
        return value

    def mover(self, new: "SparseSpace") -> SparseMover:  # noqa: D102
        return SparseMover(self, new)

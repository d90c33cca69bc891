"""Passes over sparse rows of blocks of more than 256 entries, by platform.

A row is `(blocks, k)` entries, as `entries.Storage` stores them, and a window of m rows
`(blocks, m k)`.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.passes.bisection import largest
from efcp_jax.passes.entries import SparseRow, Storage, Stored
from efcp_jax.passes.platforms import by_platform


@dataclasses.dataclass(frozen=True)
class LargeBlocks:
    """The passes over blocks of one size.

    Attributes:
        size: Entries a block.
        kept: Entries kept of each block, in [1, size].
        storage: How entries are stored.
    """

    size: int
    kept: int
    storage: Storage

    @property
    def lanes(self) -> int:
        """Blocks that lie side by side: one."""
        return 1

    def row_shape(self, count: int) -> tuple[int, int]:
        """Return the shape of the entries of a row of `count` blocks."""
        return count, self.kept

    def share(self, values: jax.Array, shares: jax.Array | None) -> jax.Array:
        """Return the values of a row times one number for each block."""
        return values if shares is None else values * shares[:, None]

    def by_block(self, entries: Any) -> Any:
        """Return entries `(blocks, m k)` as `(blocks, m, k)`."""
        return entries.reshape(len(entries), -1, self.kept)

    def from_blocks(self, entries: Any) -> Any:
        """Undo `by_block`."""
        return entries.reshape(len(entries), -1)

    def select(self, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return values and offsets, int32, of the largest entries of every block.

        Among equal magnitudes the first come first; offsets ascend. Shapes
        `(blocks, kept)`.
        """
        offsets = largest(vector, self.kept)
        return jnp.take_along_axis(vector, offsets, axis=1), offsets

    def residual(
        self, vector: jax.Array, values: jax.Array, offsets: jax.Array
    ) -> jax.Array:
        """Return `vector` less `values` at `offsets`, `(blocks, k)`, where it lies."""
        block = jnp.arange(len(vector), dtype=jnp.int32)[:, None]
        return vector.at[block, offsets.astype(jnp.int32)].add(
            -values, unique_indices=True
        )

    def inner(self, window: Stored, row: SparseRow) -> jax.Array:
        """Return the inner products of the rows of `window` with `row`.

        Args:
            window: The rows as they are stored, `(blocks, m k)`.
            row: One more row, `(blocks, k)`, with values in the dtype of the result.

        Returns:
            Array of shape `(m,)`.
        """
        return by_platform("inner_large", window, row, form=self)

    def dot(self, window: Stored, vector: jax.Array) -> jax.Array:
        """Return the inner products of the rows of `window` with any vector.

        Args:
            window: The rows as they are stored, `(blocks, m k)`.
            vector: Shape `(blocks, size)`, in the dtype of the result.

        Returns:
            Array of shape `(m,)`.
        """

        def one(slot: jax.Array) -> jax.Array:
            # A row at a time, and behind a barrier that depends on the round, or XLA on
            # CPUs would make a window of float32 in front of the loop.
            rows, slot = lax.optimization_barrier((window, slot))
            cut = lambda x: lax.dynamic_slice_in_dim(x, slot * self.kept, self.kept, 1)
            row = self.storage.load(jax.tree.map(cut, rows), vector.dtype)
            taken = jnp.take_along_axis(vector, row[1], 1, mode="promise_in_bounds")
            return jnp.sum(row[0] * taken)

        size = jax.tree.leaves(window)[0].shape[1] // self.kept
        return lax.map(one, jnp.arange(size, dtype=jnp.int32))

    def combine(self, window: Stored, weights: jax.Array, runs: Any) -> list[jax.Array]:
        """Return the sum of the rows of `window` times `weights`, cut into leaves.

        Args:
            window: The rows as they are stored, `(blocks, m k)`.
            weights: One for each row, shape `(m,)`, in the dtype of the result.
            runs: The sizes of the leaves that the blocks hold end to end, in groups: a
                CPU writes the leaves of a group together.

        Returns:
            One flat array for each leaf, in order.
        """
        return by_platform("combine_large", window, weights, form=self, runs=runs)

"""Passes over sparse rows of small blocks, by the form of each platform.

Blocks lie side by side in tiles: entry number $i$ of 128 blocks is one line of a tile,
which is what a TPU or GPU loads, compares and multiplies at once. A row is
`(tiles, k, lanes)` values and offsets, a window of m rows `(tiles, m k, lanes)`; the
vector is `(blocks, size)` with `blocks = tiles * lanes`.

A row has a few entries a block, so inner products compare offsets in place of
gathering, and where blocks are small, sums compare offsets with all places in place of
scattering: no float is added in an order that is left open.
"""

import dataclasses
from typing import Any

import jax

from efcp_jax.passes.entries import SparseRow, Tiled
from efcp_jax.passes.platforms import by_platform


# Entries of the largest block that is stored in tiles: offsets are of 8 bits, and a
# comparison with every place of a block is cheap.
LARGEST = 256

# Blocks of a tile: the lanes of a TPU's registers.
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The passes over blocks of one size.

    Attributes:
        size: Entries a block.
        kept: Entries kept of each block, in [1, size].
        lanes: Blocks of a tile.
    """

    size: int
    kept: int
    lanes: int

    def row_shape(self, count: int) -> tuple[int, int, int]:
        """Return the shape of the entries of a row of `count` blocks."""
        return count // self.lanes, self.kept, self.lanes

    def share(self, values: jax.Array, shares: jax.Array | None) -> jax.Array:
        """Return the values of a row times one number for each block."""
        if shares is None:
            return values
        return values * shares.reshape(-1, 1, self.lanes)

    def by_block(self, entries: Any) -> Any:
        """Return entries `(tiles, m k, lanes)` as `(blocks, m, k)`."""
        blocks = entries.swapaxes(1, 2).reshape(-1, entries.shape[1])
        return blocks.reshape(len(blocks), -1, self.kept)

    def from_blocks(self, entries: Any) -> Any:
        """Undo `by_block`."""
        tiles = entries.reshape(len(entries) // self.lanes, self.lanes, -1)
        return tiles.swapaxes(1, 2)

    def select(self, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the entries of largest magnitude of every block.

        Among equal magnitudes the first come first; NaN comes before infinity. Costs
        one pass over the vector on TPUs, `kept` passes elsewhere while they are few.

        Args:
            vector: Shape `(blocks, size)`.

        Returns:
            Values in the dtype of `vector` and offsets, int32, ascending in each block,
            both `(tiles, kept, lanes)`.
        """
        return by_platform("select", vector, kept=self.kept, lanes=self.lanes)

    def residual(
        self, vector: jax.Array, values: jax.Array, offsets: jax.Array
    ) -> jax.Array:
        """Return `vector` less `values` at `offsets`, in place if it is donated.

        Args:
            vector: Shape `(blocks, size)`.
            values: Shape `(tiles, k, lanes)`, in the dtype of `vector`.
            offsets: Shape `(tiles, k, lanes)`, integers, all different in a block, or
                with values of 0.

        Returns:
            Array of the shape and dtype of `vector`.
        """
        return by_platform("residual", vector, values, offsets)

    def inner(self, window: Tiled, row: SparseRow) -> jax.Array:
        """Return the inner products of the rows of `window` with `row`.

        Args:
            window: The rows as they are stored, entries `(tiles, m k, lanes)`.
            row: Values `(tiles, k, lanes)` in the dtype of the result, and offsets.

        Returns:
            Array of shape `(m,)`.
        """
        row = SparseRow(row.values, row.offsets.astype(window.offsets.dtype))
        return by_platform("inner", window, row, size=self.size)

    def dot(self, window: Tiled, vector: jax.Array) -> jax.Array:
        """Return the inner products of the rows of `window` with any vector.

        Args:
            window: The rows as they are stored, entries `(tiles, m k, lanes)`.
            vector: Shape `(blocks, size)`, in the dtype of the result.

        Returns:
            Array of shape `(m,)`.
        """
        return by_platform("dot", window, vector, kept=self.kept)

    def combine(self, window: Tiled, weights: jax.Array, runs: Any) -> list[jax.Array]:
        """Return the sum of the rows of `window` times `weights`, cut into leaves.

        Args:
            window: The rows as they are stored, entries `(tiles, m k, lanes)`.
            weights: One for each row, shape `(m,)`, in the dtype of the result.
            runs: The sizes of the leaves that the blocks hold end to end, in groups: a
                CPU writes the leaves of a group together.

        Returns:
            One flat array for each leaf, in order.
        """
        return by_platform("combine", window, weights, size=self.size, runs=runs)

"""Rows of thin factors: the arithmetic of the low-rank representation.

Leaves of equal matrices are one batch. What is done for all of them at once would take
temporaries of their size; CPUs and GPUs take a run of leaves at a time.
"""

from collections.abc import Iterator
import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax import passes, quantized
from efcp_jax.compressors.matrix import Matrix, by_row, subtract
from efcp_jax.compressors.orthonormal import orthonormal
from efcp_jax.compressors.part_movers import FactorMover
from efcp_jax.devices.collectives import Routine
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.sections import zero_after
from efcp_jax.numerics import contract, root, roots, saturate
from efcp_jax.passes import row_scale


class LowRankRow(NamedTuple):
    """Factorised matrices, $A = L^T R$, of g leaves.

    Attributes:
        left: Orthonormal rows, `(g, r, rows)`; a window has `(g, m r, rows)`.
        right: The rows that carry the scale, `(g, r, cols)`; a window `(g, m r, cols)`.
    """

    left: jax.Array
    right: jax.Array


@dataclasses.dataclass(frozen=True)
class FactorSpace:
    """Rows of `LowRankRow`, vectors `(g, rows, cols)`; a part of a `PartSpace`.

    Attributes:
        layout: The leaves, of equal matrices.
        matrix: Their matrix.
        rank: Columns of the factors.
        dtype: Dtype of the stored factors.
        run: About how many entries a run has.
    """

    layout: Layout
    matrix: Matrix
    rank: int
    dtype: np.dtype
    run: int

    @property
    def counts(self) -> int:  # noqa: D102
        return len(self.layout.leaves)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yield start and length of runs of about equal length, one leaf at least."""
        each = max(1, self.run // (self.matrix.rows * self.matrix.cols))
        each = -(-self.counts // -(-self.counts // each))
        for start in range(0, self.counts, each):
            yield start, min(each, self.counts - start)

    def _stack(self, matrices: list[jax.Array]) -> jax.Array:
        """Return this device's part of the matrices of some leaves, as one batch."""

        def own(value: jax.Array) -> jax.Array:
            ways = self.layout.ways(self.layout.split)
            missing = self.matrix.rows * ways - len(value)
            value = jnp.pad(value, [(0, missing), (0, 0)]) if missing else value
            return self.layout.own(value, axis=0)

        # Each leaf is cut before they are stacked, for only what is kept to be copied.
        return jnp.stack([own(value) for value in matrices])

    def _split(self, values: jax.Array) -> list[jax.Array]:
        """Undo `_stack`."""
        rows, _ = self.layout.leaves[0].matrix_shape
        return list(jnp.unstack(self.layout.gather(values, axis=1)[:, :rows]))

    def pack(self, tree: chex.ArrayTree) -> jax.Array:  # noqa: D102
        return self._stack(self.layout.matrices(tree))

    def unpack(self, vector: jax.Array) -> chex.ArrayTree:  # noqa: D102
        return self.layout.tree(self._split(vector))

    def zeros(self):  # noqa: D102
        rows, cols = self.matrix.rows, self.matrix.cols
        zeros = lambda dtype, *shape: jnp.zeros((self.counts, *shape), dtype)
        vector = zeros(self.layout.dtype, rows, cols)
        left, right = (zeros(self.dtype, self.rank, size) for size in (rows, cols))
        return vector, LowRankRow(left, right), right.astype(self.layout.dtype)

    def specs(self):  # noqa: D102
        rows, cols = self.matrix.row_axes or None, self.matrix.col_axes or None
        left, right = (PartitionSpec(None, None, axes) for axes in (rows, cols))
        row: Any = LowRankRow(left, right)  # pyright: ignore
        return PartitionSpec(None, rows, cols), row, right

    def accumulate(self, tree, vector: jax.Array, accept):  # noqa: D102
        matrices = self.layout.matrices(tree)
        whole = lambda: self._stack(matrices)
        if self.layout.axes:
            return saturate(vector + jnp.where(accept, whole(), 0), vector.dtype)
        runs = lambda: (self._stack(matrices[i : i + n]) for i, n in self._runs())
        return passes.add(vector, runs, whole, accept)

    def compress(self, vector: jax.Array, basis: jax.Array, scaled: bool) -> Routine:  # noqa: D102
        # One scale for all batches, which is found once.
        peak = jnp.max(jnp.abs(vector), initial=jnp.zeros((), vector.dtype))
        (peak,) = yield _largest, peak[None], None
        scale, inverse = row_scale(peak, scaled)
        first, second = roots(inverse, self.layout.dtype)
        row_axes, col_axes = self.matrix.row_axes, self.matrix.col_axes
        fresh = self._random(basis.dtype)[None]
        known = yield lax.psum, jnp.sum(jnp.abs(basis), axis=2), col_axes
        start = jnp.where(known[:, :, None] > 0, basis, fresh)
        # Scaled with the thin factor, so that no scaled copy of the matrix is made.
        left = contract("grc,gnc->grn", start * first, vector) * second
        left = yield lax.psum, left, col_axes
        left = yield from orthonormal(left, row_axes)
        left = left.astype(self.dtype)
        # The rounded factor, so that this is the best right factor for it.
        rounded = left.astype(vector.dtype)
        right = contract("grn,gnc->grc", rounded * first, vector) * second
        right = yield lax.psum, right, row_axes
        square = yield lax.psum, jnp.sum(right**2, axis=2), col_axes
        length = root(square)[:, :, None]
        unit = right / jnp.where(length > 0, length, 1)
        # A row that met nothing turns towards a fixed random one, so that no gradient
        # can stay invisible for ever.
        following = jnp.where(length > 0, unit, start + fresh)
        return LowRankRow(left, right.astype(self.dtype)), scale, following

    def _random(self, dtype: Any) -> jax.Array:
        """Return fixed random rows of length about 1, this device's part of them."""
        cols, axes = self.matrix.cols, self.matrix.col_axes
        size = cols * self.layout.ways(axes)
        columns = jax.random.normal(jax.random.key(0), (size, self.rank), dtype)
        if axes:  # the same numbers as on one device
            start = lax.axis_index(axes) * cols
            columns = lax.dynamic_slice_in_dim(columns, start, cols)
        return columns.T / math.sqrt(size)

    def feed(self, tree, error, basis, accept, count, scaled) -> Routine:  # noqa: D102
        before = quantized.load(error, self.layout.dtype)
        total = self.accumulate(tree, before, accept)
        row, scale, basis = yield from self.compress(total, basis, scaled)
        rest = self.residual(total, row, jnp.where(accept, scale, 0))
        return row, scale, quantized.store(rest, error, accept, count), basis

    def residual(self, vector: jax.Array, row: LowRankRow, scale: jax.Array):  # noqa: D102
        return subtract(vector, *row, scale)

    def inner(self, window: LowRankRow, row: LowRankRow) -> Routine:  # noqa: D102
        # <L^T R, L'^T R'> = sum of (L L'^T) * (R R'^T), entry by entry.
        lefts, rights = (
            contract("gpn,gsn->gps", *both).astype(self.layout.dtype)
            for both in zip(window, row, strict=True)
        )
        copies = self.matrix.copies
        if self.matrix.row_axes and self.matrix.col_axes:
            lefts = yield lax.psum, lefts, self.matrix.row_axes
            copies *= self.layout.ways(self.matrix.row_axes)
        return by_row(rights * lefts, self.rank) / copies

    def dot(self, window: LowRankRow, vector: jax.Array) -> jax.Array:  # noqa: D102
        each = contract("gpn,gnc->gpc", window.left, vector) * window.right
        return by_row(jnp.sum(each, axis=2), self.rank) / self.matrix.copies

    def combine(self, window: LowRankRow, coefficients: jax.Array):  # noqa: D102
        dtype = coefficients.dtype
        each = jnp.repeat(coefficients, self.rank, axis=1)[:, :, None]
        left, right = (side.astype(dtype) for side in window)
        return contract("gpn,gpc->gnc", left * each, right)

    def update(self, window: LowRankRow, coefficients: jax.Array):  # noqa: D102
        if self.layout.axes:
            return self.unpack(self.combine(window, coefficients))
        matrices: list[jax.Array] = []
        # Every run starts from a zero that is known once the last one's are copied.
        zero = jnp.zeros((), self.layout.dtype)
        for start, count in self._runs():
            at = lax.optimization_barrier(start + zero.astype(jnp.int32))
            own = jax.tree.map(
                lambda x, at=at, n=count: lax.dynamic_slice_in_dim(x, at, n),
                (window, coefficients + zero),
            )
            matrices += (values := self._split(self.combine(*own)))
            zero = zero_after(zero, *values)
        return self.layout.tree(matrices)

    def mover(self, new: "FactorSpace") -> FactorMover:  # noqa: D102
        return FactorMover(self, new)


def _largest(peaks: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.max(peaks), peaks.shape)

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
from efcp_jax.compressors.movers import FactorMover
from efcp_jax.compressors.thin import orthonormal, subtract
from efcp_jax.devices.collectives import Routine
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.sections import zero_after
from efcp_jax.numerics import contract, root, roots, saturate
from efcp_jax.passes import row_scale


class LowRankRow(NamedTuple):
    """Factorised matrices, $A = L^T R$, of g leaves; the rows of $L$ are orthonormal.

    Shapes are `(g, r, rows)` and `(g, r, cols)`; a window has m r in place of r.
    """

    left: jax.Array
    right: jax.Array


@dataclasses.dataclass(frozen=True)
class FactorSpace:
    """Rows of `LowRankRow`, vectors `(g, rows, cols)`; a part of a `PartSpace`.

    The leaves have equal matrices, which lie on the devices alike; a run has about
    `run` entries.
    """

    layout: Layout
    rank: int
    dtype: np.dtype
    run: int

    @property
    def counts(self) -> int:  # noqa: D102
        return len(self.layout.leaves)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of a matrix on this device, padded to divide, and columns."""
        rows, cols = self.layout.leaves[0].matrix_shape
        return -(-rows // self.layout.ways(self.layout.split)), cols

    @property
    def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Mesh axes that split the rows, and the columns."""
        leaf = self.layout.leaves[0]
        return (*leaf.row_axes, *self.layout.split), leaf.col_axes

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yield start and length of runs of about equal length, one leaf at least."""
        each = max(1, self.run // math.prod(self.shape))
        each = -(-self.counts // -(-self.counts // each))
        for start in range(0, self.counts, each):
            yield start, min(each, self.counts - start)

    def _stack(self, matrices: list[jax.Array]) -> jax.Array:
        """Return this device's part of the matrices of some leaves, as one batch."""

        def own(value: jax.Array) -> jax.Array:
            missing = -len(value) % self.layout.ways(self.layout.split)
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
        vector = jnp.zeros((self.counts, *self.shape), self.layout.dtype)
        shapes = [(self.counts, self.rank, size) for size in self.shape]
        left, right = (jnp.zeros(shape, self.dtype) for shape in shapes)
        return vector, LowRankRow(left, right), right.astype(self.layout.dtype)

    def specs(self):  # noqa: D102
        rows, cols = (axes or None for axes in self.axes)
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
        row_axes, col_axes = self.axes
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
        (_, cols), (_, axes) = self.shape, self.axes
        # The same numbers as on one device.
        first = lax.axis_index(axes) * cols if axes else 0
        numbers = quantized.uniform((cols, self.rank), jnp.int32(1), first)
        spread = math.sqrt(12 / (cols * self.layout.ways(axes)))
        return ((numbers - 0.5) * spread).astype(dtype).T

    def feed(self, gradient, error, basis, accept, count, scaled) -> Routine:  # noqa: D102
        before = quantized.load(error, self.layout.dtype)
        total = self.accumulate(gradient.tree, before, accept)
        row, scale, basis = yield from self.compress(total, basis, scaled)
        taken = jnp.where(accept, scale, 0)
        rest = subtract(total, row.left, row.right, taken)
        return row, scale, quantized.store(rest, error, accept, count), basis

    def inner(self, window: LowRankRow, row: LowRankRow) -> Routine:  # noqa: D102
        # <L^T R, L'^T R'> = sum of (L L'^T) * (R R'^T), entry by entry.
        lefts, rights = (
            contract("gpn,gsn->gps", *both).astype(self.layout.dtype)
            for both in zip(window, row, strict=True)
        )
        copies = self.layout.copies(self.layout.leaves[0])
        row_axes, col_axes = self.axes
        if row_axes and col_axes:
            lefts = yield lax.psum, lefts, row_axes
            copies *= self.layout.ways(row_axes)
        return self._by_row(rights * lefts) / copies

    def dot(self, window: LowRankRow, vector: jax.Array) -> jax.Array:  # noqa: D102
        each = contract("gpn,gnc->gpc", window.left, vector) * window.right
        copies = self.layout.copies(self.layout.leaves[0])
        return self._by_row(jnp.sum(each, axis=2)) / copies

    def _by_row(self, products: jax.Array) -> jax.Array:
        """Return sums `(g, m)` of what each row of a window has of `(g, m r, ...)`."""
        each = products.reshape(len(products), products.shape[1] // self.rank, -1)
        return jnp.sum(each, axis=2)

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
            combined = self.combine(*own)
            matrices += self._split(combined)
            zero = zero_after(zero, combined)
        return self.layout.tree(matrices)

    def mover(self, new: "FactorSpace") -> FactorMover:  # noqa: D102
        return FactorMover(self, new)


def _largest(peaks: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.max(peaks), peaks.shape)

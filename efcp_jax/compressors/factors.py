"""Rows of thin factors: the arithmetic of the low-rank representation."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax.compressors.matrix import Matrix
from efcp_jax.compressors.movers import FactorMover
from efcp_jax.compressors.orthonormal import orthonormal
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.routines import Routine, together
from efcp_jax.numerics import dot, saturate


class LowRankRow(NamedTuple):
    """One factorised matrix a leaf, $A = L R^T$; both trees mirror the parameters.

    Attributes:
        left: Orthonormal columns, `(rows, r)` a leaf; a window has `(rows, m, r)`.
        right: The columns that carry the scale, `(cols, r)`; a window `(cols, m, r)`.
    """

    left: chex.ArrayTree
    right: chex.ArrayTree


@dataclasses.dataclass(frozen=True)
class LowRankSpace:
    """Rows of `LowRankRow`; vectors are trees of matrices."""

    layout: Layout
    matrices: tuple[Matrix, ...]
    dtype: np.dtype
    block_diagonal: bool

    def _map(self, function, *trees):
        """Apply `function(matrix, *leaves)` to every leaf and return the results."""
        leaves = [self.layout.treedef.flatten_up_to(tree) for tree in trees]
        return [function(*each) for each in zip(self.matrices, *leaves, strict=True)]

    def _tree(self, leaves: list) -> chex.ArrayTree:
        return self.layout.treedef.unflatten(leaves)

    def pack(self, tree: chex.ArrayTree) -> chex.ArrayTree:  # noqa: D102
        packed = []
        for value, matrix in zip(
            self.layout.matrices(tree), self.matrices, strict=True
        ):
            ways = self.layout.ways(self.layout.split)
            if matrix.whole:
                value = value.reshape(1, -1)
                value = jnp.pad(value, [(0, 0), (0, matrix.cols * ways - value.size)])
                packed.append(self.layout.own(value, axis=1))
            else:
                missing = matrix.rows * ways - value.shape[0]
                value = jnp.pad(value, [(0, missing), (0, 0)])
                packed.append(self.layout.own(value, axis=0))
        return self._tree(packed)

    def unpack(self, vector: chex.ArrayTree) -> chex.ArrayTree:  # noqa: D102
        def leaf_matrix(matrix, leaf, value):
            value = self.layout.gather(value, axis=1 if matrix.whole else 0)
            if matrix.whole:
                return value[0, : leaf.size].reshape(leaf.matrix_shape)
            return value[: leaf.matrix_shape[0]]

        values = self.layout.treedef.flatten_up_to(vector)
        return self.layout.tree(
            [
                leaf_matrix(*each)
                for each in zip(self.matrices, self.layout.leaves, values, strict=True)
            ]
        )

    def zeros(self):  # noqa: D102
        vector = [jnp.zeros((a.rows, a.cols), self.layout.dtype) for a in self.matrices]
        left = [jnp.zeros((a.rows, a.rank), self.dtype) for a in self.matrices]
        right = [jnp.zeros((a.cols, a.rank), self.dtype) for a in self.matrices]
        # A leaf kept whole has no basis, but every tree mirrors the parameters.
        basis = [
            jnp.zeros((1 if a.whole else a.cols, a.rank), self.layout.dtype)
            for a in self.matrices
        ]
        row = LowRankRow(self._tree(left), self._tree(right))
        return self._tree(vector), row, self._tree(basis)

    def specs(self):  # noqa: D102
        spec = lambda *axes: PartitionSpec(*(names or None for names in axes))
        vector = self._tree([spec(a.row_axes, a.col_axes) for a in self.matrices])
        left = self._tree([spec(a.row_axes) for a in self.matrices])
        right = self._tree([spec(a.col_axes) for a in self.matrices])
        basis = self._tree([spec(() if a.whole else a.col_axes) for a in self.matrices])
        return vector, LowRankRow(left, right), basis

    def accumulate(self, tree, vector, accept):  # noqa: D102
        add = lambda e, g: saturate(e + jnp.where(accept, g, 0), e.dtype)
        return jax.tree.map(add, vector, self.pack(tree))

    def compress(self, vector: Any, basis: Any, factor: chex.Numeric = 1.0):  # noqa: D102
        def factors(matrix: Matrix, value, start) -> Routine:
            value = value * factor
            if matrix.whole:
                return jnp.ones((1, 1), self.dtype), value.T.astype(self.dtype), start
            fresh = _random(matrix, start.dtype)
            known = yield lax.psum, jnp.sum(jnp.abs(start), axis=0), matrix.col_axes
            left = dot(value, jnp.where(known > 0, start, fresh))
            left = yield lax.psum, left, matrix.col_axes
            left = yield from orthonormal(left, matrix.row_axes)
            left = left.astype(self.dtype)
            # The rounded factor, so that this is the best right factor for it.
            right = dot(value.T, left.astype(value.dtype))
            right = yield lax.psum, right, matrix.row_axes
            square = yield lax.psum, jnp.sum(right**2, axis=0), matrix.col_axes
            length = jnp.sqrt(square)
            unit = right / jnp.where(length > 0, length, 1)
            # A column that met nothing turns towards a fixed random one, so that no
            # gradient can stay invisible for ever.
            following = jnp.where(length > 0, unit, start + fresh)
            return left, right.astype(self.dtype), following

        results = together(self._map(factors, vector, basis))
        left, right, following = ([r[i] for r in results] for i in range(3))
        row = LowRankRow(self._tree(left), self._tree(right))
        return row, self._tree(following)

    def expand(self, row: LowRankRow) -> chex.ArrayTree:  # noqa: D102
        dtype = self.layout.dtype
        product = lambda _, left, right: dot(left.astype(dtype), right.astype(dtype).T)
        return self._tree(self._map(product, row.left, row.right))

    def residual(self, vector: chex.ArrayTree, row: LowRankRow, scale: jax.Array):  # noqa: D102
        subtract = lambda a, c: saturate(a - scale * c, a.dtype)
        return jax.tree.map(subtract, vector, self.expand(row))

    def inner(self, window: LowRankRow, row: LowRankRow):  # noqa: D102
        dtype = self.layout.dtype

        def products(window_factor, factor):
            return jnp.einsum(
                "nmr,ns->mrs",
                window_factor,
                factor,
                precision=lax.Precision.HIGHEST,
                preferred_element_type=dtype,
            )

        def leaf_inner(matrix: Matrix, left, right, row_left, row_right) -> Routine:
            # <L R^T, L' R'^T> = sum of (L^T L') * (R^T R'), entry by entry.
            lefts, rights = products(left, row_left), products(right, row_right)
            copies = matrix.copies
            if matrix.row_axes and matrix.col_axes:
                lefts = yield lax.psum, lefts, matrix.row_axes
                copies *= self.layout.ways(matrix.row_axes)
            return jnp.sum(lefts * rights, axis=(1, 2)) / copies

        factors = (window.left, window.right, row.left, row.right)
        parts = together(self._map(leaf_inner, *factors))
        if self.block_diagonal:
            return self._tree(parts)
        size = jax.tree.leaves(window)[0].shape[1] if parts else 1
        return sum(parts, jnp.zeros(size, dtype))

    def combine(self, window: LowRankRow, coefficients):  # noqa: D102
        def leaf_combine(_, left, right, weights):
            dtype = weights.dtype
            weighted = left.astype(dtype) * weights[:, None]
            return dot(
                weighted.reshape(left.shape[0], -1),
                right.astype(dtype).reshape(right.shape[0], -1).T,
            )

        if not self.block_diagonal:
            coefficients = self._tree([coefficients] * len(self.matrices))
        values = self._map(leaf_combine, window.left, window.right, coefficients)
        return self._tree(values)

    def update(self, window: LowRankRow, coefficients):  # noqa: D102
        return self.unpack(self.combine(window, coefficients))

    def grams(self, value: jax.Array) -> chex.ArrayTree:  # noqa: D102
        if not self.block_diagonal:
            return value
        return self._tree([value] * len(self.matrices))

    def mover(self, new: "LowRankSpace") -> FactorMover:  # noqa: D102
        return FactorMover(self, new)


def _random(matrix: Matrix, dtype: Any) -> jax.Array:
    """Return fixed random columns of length about 1, this device's part of them."""
    rows = matrix.cols * matrix.col_ways
    columns = jax.random.normal(jax.random.key(0), (rows, matrix.rank), dtype)
    if matrix.col_axes:  # the same numbers as on one device
        start = lax.axis_index(matrix.col_axes) * matrix.cols
        columns = lax.dynamic_slice_in_dim(columns, start, matrix.cols)
    return columns / np.sqrt(rows)

"""Rows of thin factors: the arithmetic of the low-rank representation."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax.compressors import batches, many_grams
from efcp_jax.compressors.base import feed
from efcp_jax.compressors.groups import Group
from efcp_jax.compressors.matrix import Matrix
from efcp_jax.compressors.movers import FactorMover
from efcp_jax.compressors.orthonormal import orthonormal
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.routines import Routine, together
from efcp_jax.numerics import contract, root, roots
from efcp_jax.passes import row_scale


# An array for each group, by the name of the group.
Batches: TypeAlias = dict[str, jax.Array]


class LowRankRow(NamedTuple):
    """Factorised matrices, $A = L^T R$, in batches: an array for each group of leaves.

    Attributes:
        left: Orthonormal rows, `(g, r, rows)` for g leaves; a window has
            `(g, m r, rows)`. Leaves kept whole have none.
        right: The rows that carry the scale, `(g, r, cols)`; a window
            `(g, m r, cols)`. A leaf kept whole is its only row.
    """

    left: Batches
    right: Batches


@dataclasses.dataclass(frozen=True)
class LowRankSpace:
    """Rows of `LowRankRow`; vectors have a batch of matrices for each group."""

    layout: Layout
    groups: tuple[Group, ...]
    dtype: np.dtype
    block_diagonal: bool

    def where(self) -> dict[str, tuple[str, ...]]:
        """Return the paths of the leaves of each group, in the order of its batch."""
        numbered = self.layout.treedef.unflatten(range(len(self.layout.leaves)))
        paths = jax.tree_util.tree_leaves_with_path(numbered)
        names = [jax.tree_util.keystr(path) for path, _ in paths]
        return {g.name: tuple(names[i] for i in g.indices) for g in self.groups}

    def _map(self, function: Callable[..., Any], *trees: Any) -> dict[str, Any]:
        """Return `function(matrix, *arrays)` for every group; None for no array."""
        return {
            g.name: function(g.matrix, *(tree.get(g.name) for tree in trees))
            for g in self.groups
        }

    def _thin(self, batches: dict[str, Any]) -> dict[str, Any]:
        """Return what there is for the groups of leaves that are not kept whole."""
        return {g.name: batches[g.name] for g in self.groups if not g.matrix.whole}

    def pack(self, tree: chex.ArrayTree) -> Batches:  # noqa: D102
        matrices = self.layout.matrices(tree)
        return {g.name: g.stack(matrices, self.layout) for g in self.groups}

    def unpack(self, vector: Batches) -> chex.ArrayTree:  # noqa: D102
        matrices: dict[int, jax.Array] = {}
        for group in self.groups:
            values = group.split(vector[group.name], self.layout)
            matrices |= zip(group.indices, values, strict=True)
        return self.layout.tree([matrices[i] for i in range(len(matrices))])

    def zeros(self):  # noqa: D102
        def zeros(group: Group, dtype: np.dtype, *shape: int) -> jax.Array:
            return jnp.zeros((len(group.indices), *shape), dtype)

        vector, left, right, basis = {}, {}, {}, {}
        for group in self.groups:
            name, a = group.name, group.matrix
            vector[name] = zeros(group, self.layout.dtype, *batches.shape(a))
            left[name] = zeros(group, self.dtype, a.rank, a.rows)
            right[name] = zeros(group, self.dtype, a.rank, a.cols)
            basis[name] = zeros(group, self.layout.dtype, a.rank, a.cols)
        return vector, LowRankRow(self._thin(left), right), self._thin(basis)

    def specs(self):  # noqa: D102
        def spec(*axes: tuple[str, ...]) -> Any:
            return PartitionSpec(None, *(names or None for names in axes))

        vector = self._map(
            lambda a: spec(a.col_axes) if a.whole else spec(a.row_axes, a.col_axes)
        )
        left = self._thin(self._map(lambda a: spec((), a.row_axes)))
        right = self._map(lambda a: spec((), a.col_axes))
        return vector, LowRankRow(left, right), self._thin(right)

    def accumulate(self, tree, vector: Batches, accept):  # noqa: D102
        matrices, layout = self.layout.matrices(tree), self.layout
        return {
            g.name: batches.accumulate(g, matrices, layout, vector[g.name], accept)
            for g in self.groups
        }

    def compress(self, vector: Batches, basis: Any, scaled: bool):  # noqa: D102
        scale, inverse = row_scale(vector, scaled)
        first, second = roots(inverse, self.layout.dtype)

        def factors(matrix: Matrix, value, start) -> Routine:
            if matrix.whole:
                return None, (value * inverse).astype(self.dtype)[:, None], None
            fresh = _random(matrix, start.dtype)[None]
            known = yield lax.psum, jnp.sum(jnp.abs(start), axis=2), matrix.col_axes
            start = jnp.where(known[:, :, None] > 0, start, fresh)
            # Scaled with the thin factor, so that no scaled copy of the matrix is made.
            left = contract("grc,gnc->grn", start * first, value) * second
            left = yield lax.psum, left, matrix.col_axes
            left = yield from orthonormal(left, matrix.row_axes)
            left = left.astype(self.dtype)
            # The rounded factor, so that this is the best right factor for it.
            rounded = left.astype(value.dtype)
            right = contract("grn,gnc->grc", rounded * first, value) * second
            right = yield lax.psum, right, matrix.row_axes
            square = yield lax.psum, jnp.sum(right**2, axis=2), matrix.col_axes
            length = root(square)[:, :, None]
            unit = right / jnp.where(length > 0, length, 1)
            # A row that met nothing turns towards a fixed random one, so that no
            # gradient can stay invisible for ever.
            following = jnp.where(length > 0, unit, start + fresh)
            return left, right.astype(self.dtype), following

        made = self._map(factors, vector, basis)
        results = dict(zip(made, together(made.values()), strict=True))
        left, right, following = (
            {name: result[i] for name, result in results.items()} for i in range(3)
        )
        return LowRankRow(self._thin(left), right), scale, self._thin(following)

    def feed(self, tree, error, basis, accept, count, scaled):  # noqa: D102
        return feed(self, tree, error, basis, accept, count, scaled)

    def expand(self, row: LowRankRow) -> Batches:  # noqa: D102
        one = jnp.ones((), self.layout.dtype)
        return self._map(
            lambda _, left, right: batches.product(left, right, one),
            row.left,
            row.right,
        )

    def residual(self, vector: Batches, row: LowRankRow, scale: jax.Array):  # noqa: D102
        return self._map(
            lambda _, values, left, right: batches.subtract(values, left, right, scale),
            vector,
            row.left,
            row.right,
        )

    def inner(self, window: LowRankRow, row: LowRankRow):  # noqa: D102
        dtype = self.layout.dtype

        def products(all_rows: jax.Array, factor: jax.Array) -> jax.Array:
            return contract("gpn,gsn->gps", all_rows, factor).astype(dtype)

        def group_inner(matrix: Matrix, left, right, row_left, row_right) -> Routine:
            # <L^T R, L'^T R'> = sum of (L L'^T) * (R R'^T), entry by entry.
            rights, copies = products(right, row_right), matrix.copies
            if not matrix.whole:
                lefts = products(left, row_left)
                if matrix.row_axes and matrix.col_axes:
                    lefts = yield lax.psum, lefts, matrix.row_axes
                    copies *= self.layout.ways(matrix.row_axes)
                rights = rights * lefts
            each = rights.reshape(len(rights), -1, matrix.rank**2)
            return jnp.sum(each, axis=2) / copies

        made = self._map(group_inner, window.left, window.right, row.left, row.right)
        return self._sums(dict(zip(made, together(made.values()), strict=True)))

    def dot(self, window: LowRankRow, vector: Batches):  # noqa: D102
        return self._sums(self._map(batches.dot, window.left, window.right, vector))

    def _sums(self, parts: Batches) -> Any:
        """Return inner products `(g, m)` of groups as there are Gram matrices."""
        if self.block_diagonal:
            return parts
        sums = [jnp.sum(part, axis=0) for part in parts.values()]
        return sum(sums[1:], sums[0]) if sums else jnp.zeros(1, self.layout.dtype)

    def combine(self, window: LowRankRow, coefficients):  # noqa: D102
        weights = self._weights(coefficients)
        return self._map(batches.combine, window.left, window.right, weights)

    def update(self, window: LowRankRow, coefficients):  # noqa: D102
        if self.layout.axes:
            return self.unpack(self.combine(window, coefficients))
        weights = self._weights(coefficients)
        return batches.update(self.groups, self.layout, *window, weights)

    def _weights(self, coefficients: Any) -> Batches:
        """Return the coefficients for each group, `(g, m)` or the same, `(1, m)`."""
        if self.block_diagonal:
            return coefficients
        return {group.name: coefficients[None] for group in self.groups}

    def grams(self, value: Any) -> Any:  # noqa: D102
        if not self.block_diagonal:
            return value
        counts = {group.name: len(group.indices) for group in self.groups}
        return many_grams.repeated(counts, value)

    def each_gram(self, function, *, in_turn: bool = False):  # noqa: D102
        if not self.block_diagonal:
            return function
        return many_grams.of_all(function, in_turn)

    def mover(self, new: "LowRankSpace") -> FactorMover:  # noqa: D102
        return FactorMover(self, new)


def _random(matrix: Matrix, dtype: Any) -> jax.Array:
    """Return fixed random rows of length about 1, this device's part of them."""
    size = matrix.cols * matrix.col_ways
    columns = jax.random.normal(jax.random.key(0), (size, matrix.rank), dtype)
    if matrix.col_axes:  # the same numbers as on one device
        start = lax.axis_index(matrix.col_axes) * matrix.cols
        columns = lax.dynamic_slice_in_dim(columns, start, matrix.cols)
    return columns.T / math.sqrt(size)

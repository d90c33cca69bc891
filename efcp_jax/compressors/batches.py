"""Products of batches of thin factors, and the copies that each platform does without.

A batch stands for the leaves of one group. What is done for all of them at once would
take temporaries of the size of the group; CPUs and GPUs take a run of leaves at a time.
"""

from collections.abc import Iterator
import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax import passes
from efcp_jax.compressors.groups import Group
from efcp_jax.compressors.matrix import Matrix
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.sections import zero_after
from efcp_jax.numerics import contract, roots, saturate


# Into about how many runs all leaves are taken, and the least entries of a run.
_RUNS = 8
_SMALLEST = 65_536

# Up to this rank a product is subtracted in one pass. Above, a matrix unit or a library
# is faster.
_THIN = 8


def shape(matrix: Matrix) -> tuple[int, ...]:
    """Return the shape of one matrix of a vector."""
    return (matrix.cols,) if matrix.whole else (matrix.rows, matrix.cols)


def product(left: jax.Array | None, right: jax.Array, factor: jax.Array) -> jax.Array:
    """Return `factor` $L^T R$ for each pair of factors, in the dtype of `factor`.

    Args:
        left: Shape `(g, r, rows)`, or None for leaves kept whole.
        right: Shape `(g, r, cols)`, with one row for leaves kept whole.
        factor: A scalar.

    Returns:
        Array of shape `(g, rows, cols)`, or `(g, cols)`.
    """
    # The power of two comes last: compilers join it with a sum, which rounds nothing.
    first, second = roots(factor, factor.dtype)
    right = right.astype(factor.dtype)
    if left is None:
        return right[:, 0] * first * second
    return second * contract("grn,grc->gnc", left.astype(factor.dtype) * first, right)


def subtract(
    values: jax.Array, left: jax.Array | None, right: jax.Array, factor: jax.Array
) -> jax.Array:
    """Return `values` minus `product`, within the range of their dtype."""
    # The rounding of one pass depends on what the compiler joins in it. Where the
    # product takes no memory to speak of, results are the same in every program.
    if left is None or right.shape[1] > _THIN or values.size <= _SMALLEST:
        return saturate(values - product(left, right, factor), values.dtype)
    first, second = roots(factor, values.dtype)
    left = left.astype(values.dtype) * first
    right = right.astype(values.dtype)
    rest = passes.subtract_products(values, left, right, second)
    return saturate(rest, values.dtype)


def dot(
    matrix: Matrix, left: jax.Array | None, right: jax.Array, vector: jax.Array
) -> jax.Array:
    """Return the inner products of the matrices of a window with those of a vector.

    Args:
        matrix: What the factors stand for.
        left: Shape `(g, m r, rows)`, or None for leaves kept whole.
        right: Shape `(g, m r, cols)`.
        vector: Shape `(g, rows, cols)`, or `(g, cols)`.

    Returns:
        Array of shape `(g, m)`: this device's share.
    """
    if left is None:
        return contract("gpc,gc->gp", right, vector) / matrix.copies
    products = jnp.sum(contract("gpn,gnc->gpc", left, vector) * right, axis=2)
    each = products.reshape(len(products), -1, matrix.rank)
    return jnp.sum(each, axis=2) / matrix.copies


def combine(
    matrix: Matrix, left: jax.Array | None, right: jax.Array, weights: jax.Array
) -> jax.Array:
    """Return the sum of the matrices of a window, times coefficients.

    Args:
        matrix: What the factors stand for.
        left: Shape `(g, m r, rows)`, or None for leaves kept whole.
        right: Shape `(g, m r, cols)`.
        weights: Coefficients, `(g, m)`, or `(1, m)` for the same everywhere.

    Returns:
        Array of shape `(g, rows, cols)`, or `(g, cols)`.
    """
    dtype = weights.dtype
    if left is None:
        weights = jnp.broadcast_to(weights, (len(right), weights.shape[1]))
        return contract("gmn,gm->gn", right.astype(dtype), weights)
    each = jnp.repeat(weights, matrix.rank, axis=1)[:, :, None]
    return contract("gpn,gpc->gnc", left.astype(dtype) * each, right.astype(dtype))


def update(
    groups: tuple[Group, ...],
    layout: Layout,
    left: dict[str, jax.Array],
    right: dict[str, jax.Array],
    weights: dict[str, jax.Array],
) -> chex.ArrayTree:
    """Return the tree of what `combine` returns for all groups, a run at a time."""
    matrices: dict[int, jax.Array] = {}
    # Every run starts from a zero that is known once the leaves of the last are copied.
    zero = jnp.zeros((), layout.dtype)
    for group in groups:
        lefts, rights = left.get(group.name), right[group.name]
        for start, count in group.runs(_run(layout)):
            at = lax.optimization_barrier(start + zero.astype(jnp.int32))
            product = combine(
                group.matrix,
                None if lefts is None else _part(lefts, at, count),
                _part(rights, at, count),
                _part(weights[group.name] + zero, at, count),
            )
            values = group.split(product, layout, start)
            matrices |= zip(group.indices[start : start + count], values, strict=True)
            zero = zero_after(zero, *values)
    return layout.tree([matrices[i] for i in range(len(matrices))])


def accumulate(
    group: Group,
    matrices: list[jax.Array],
    layout: Layout,
    values: jax.Array,
    accept: jax.Array,
) -> jax.Array:
    """Return `values` plus the leaves of `group` if `accept`, within their range.

    Args:
        group: The leaves that are added.
        matrices: The matrix of each leaf of the tree, on this device.
        layout: The leaves of the tree.
        values: Shape `(g, rows, cols)`, or `(g, cols)`.
        accept: A boolean.

    Returns:
        Array of the shape and dtype of `values`.
    """
    whole = functools.partial(group.stack, matrices, layout)
    if layout.axes:
        return saturate(values + jnp.where(accept, whole(), 0), values.dtype)

    def runs() -> Iterator[jax.Array]:
        for start, count in group.runs(_run(layout)):
            indices = group.indices[start : start + count]
            yield group._replace(indices=indices).stack(matrices, layout)

    return passes.add(values, runs, whole, accept)


def _run(layout: Layout) -> int:
    """Return about how many entries a run of leaves has."""
    total = sum(leaf.size for leaf in layout.leaves)
    return max(_SMALLEST, total // _RUNS)


def _part(array: jax.Array, start: Any, count: int) -> jax.Array:
    """Return `count` members of a batch; all, if it is one for every leaf."""
    if len(array) in (1, count):
        return array
    return lax.dynamic_slice_in_dim(array, start, count)

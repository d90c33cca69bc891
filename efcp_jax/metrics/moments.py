r"""Running second moments of the leaves of a gradient, whole or factored.

A leaf of two or more axes with entries $v_{ij}$, $j$ along the last axis and $i$ along
all others, is factored as in Adafactor: $v_{ij} \approx r_i c_j / \bar r$ from the
means $r_i$ over its rows and $c_j$ over its columns, which is exact where $v$ has rank
one.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efcp_jax.devices.layout import Layout, Leaf
from efcp_jax.devices.routines import Routine
from efcp_jax.numerics import cast


class Factored(NamedTuple):
    """Means of second moments of a leaf `(..., n)`.

    Attributes:
        rows: Over the last axis, shape `(...)`.
        cols: Over all other axes, shape `(n,)`.
    """

    rows: jax.Array
    cols: jax.Array


class MetricState(NamedTuple):
    """What a diagonal metric keeps.

    Attributes:
        mean: Mean of the moments over all parameters behind the last step; 0 before
            the first.
        moments: In the structure of the parameters, an array of the shape of the leaf
            or a `Factored` for each.
    """

    mean: jax.Array
    moments: Any


def factors(leaf: Leaf, factored: bool) -> bool:
    """Return whether the moments of `leaf` are factored: if that makes them smaller."""
    if not factored or len(leaf.whole) < 2:
        return False
    rows, cols = math.prod(leaf.whole[:-1]), leaf.whole[-1]
    return rows + cols < rows * cols


def zeros(leaf: Leaf, factored: bool, dtype: Any) -> Any:
    """Return the moments of `leaf` before the first gradient."""
    if factors(leaf, factored):
        shapes = leaf.shape[:-1], leaf.shape[-1:]
        return Factored(*(jnp.zeros(shape, dtype) for shape in shapes))
    return jnp.zeros(leaf.shape, dtype)


def specs(leaf: Leaf, factored: bool) -> Any:
    """Return how the moments of `leaf` are divided among devices: as the leaf is."""
    spec: Any = PartitionSpec(*(names or None for names in leaf.partition))
    if factors(leaf, factored):
        axes = tuple(spec)
        return Factored(PartitionSpec(*axes[:-1]), PartitionSpec(*axes[-1:]))
    return spec


class Observed(NamedTuple):
    """The moments of a leaf, and what is needed of them at once.

    Attributes:
        moments: An array or a `Factored`, as they are kept.
        rows: Root of the moments over the last axis, `(...)`, next to that of their
            mean; of a leaf that is not factored the roots of all moments.
        cols: Root of the moments over all other axes; None for a leaf not factored.
        total: This device's share of the sum of the moments of the whole leaf, where
            all devices together count it once, over the number of parameters.
    """

    moments: Any
    rows: jax.Array
    cols: jax.Array | None
    total: jax.Array


def observe(
    leaf: Leaf, layout: Layout, value: jax.Array, old: Any, weight: jax.Array
) -> Routine:
    """Return what is `Observed` of the gradient `value` of a leaf, given `weight`."""
    # Squares overflow for entries above 1e19, and vanish for those below 1e-19.
    limit = float(jnp.finfo(value.real.dtype).max) / 4
    squares = jnp.square(value.real)
    if leaf.parts == 2:
        squares = squares + jnp.square(value.imag)
    squares = jnp.minimum(squares, limit)
    all_entries = sum(math.prod(each.whole) for each in layout.leaves)
    devices = layout.ways(layout.axes)
    if not isinstance(old, Factored):
        new = _towards(old, squares, weight)
        copies = devices // layout.ways(leaf.axes)
        wide = new.astype(squares.dtype)
        total = jnp.sum(wide * (1 / (all_entries * copies)))
        return Observed(new, jnp.sqrt(wide), None, total)
    # Padding adds nothing, and is not counted.
    rows, cols = math.prod(leaf.whole[:-1]), leaf.whole[-1]
    by_row = jnp.sum(squares * (1 / cols), axis=-1)
    by_col = jnp.sum(squares * (1 / rows), axis=tuple(range(squares.ndim - 1)))
    if leaf.col_axes:
        by_row = yield lax.psum, by_row, leaf.col_axes
    new_rows = _towards(old.rows, by_row, weight)
    wide_rows = new_rows.astype(squares.dtype)
    mean = jnp.sum(wide_rows * (1 / rows))
    if leaf.row_axes:
        both = jnp.concatenate([by_col, mean[None]])
        both = yield lax.psum, both, leaf.row_axes
        by_col, mean = both[:-1], both[-1]
    new_cols = _towards(old.cols, by_col, weight)
    root = jnp.where(mean > 0, jnp.sqrt(mean), 1)
    return Observed(
        moments=Factored(new_rows, new_cols),
        rows=jnp.sqrt(wide_rows) / root,
        cols=jnp.sqrt(new_cols.astype(squares.dtype)),
        total=mean * (rows * cols / (all_entries * devices)),
    )


def _towards(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """Return what lies `weight` of the way from `old` to `new`; `old` if it is 0."""
    before = old.astype(new.dtype)
    # What a gradient that is not accepted holds may be NaN.
    step = jnp.where(weight > 0, weight * (new - before), 0)
    return cast(before + step, old.dtype)


def summary(state: MetricState) -> tuple[jax.Array, jax.Array]:
    r"""Return the root mean square of the gradient, and the spread of the diagonal.

    The spread is the standard deviation of $\sqrt{v}$ over its root mean square,
    $\sqrt{1 - (\overline{\sqrt{v}})^2 / \bar v}$, in [0, 1); 0 before the first step.
    """
    dtype, sums, count = state.mean.dtype, [jnp.zeros((2,), state.mean.dtype)], 0
    known = jnp.where(state.mean > 0, state.mean, 1)
    is_factored = lambda node: isinstance(node, Factored)
    for kept in jax.tree.leaves(state.moments, is_leaf=is_factored):
        parts = [x.astype(dtype) / known for x in jax.tree.leaves(kept)]
        squares, roots = jnp.mean(parts[0]), jnp.mean(jnp.sqrt(parts[0]))
        if is_factored(kept):  # the mean of a product of factors is that of the means
            roots *= jnp.mean(jnp.sqrt(parts[1]))
            roots /= jnp.sqrt(jnp.where(squares > 0, squares, 1))
        size = math.prod(part.size for part in parts)
        sums.append(size * jnp.stack([squares, roots]))
        count += size
    squares, roots = functools.reduce(jnp.add, sums) / max(count, 1)
    share = roots**2 / jnp.where(squares > 0, squares, 1)
    spread = jnp.where(squares > 0, jnp.sqrt(jnp.maximum(1 - share, 0)), 0)
    return jnp.sqrt(state.mean), spread

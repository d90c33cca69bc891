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
        *above, last = spec
        rows: Any = PartitionSpec(*above)
        cols: Any = PartitionSpec(last)
        return Factored(rows, cols)
    return spec


class Sums(NamedTuple):
    """What a gradient adds to the moments of equal leaves; NaN if it is not finite.

    Attributes:
        rows: This device's share of the means of squares over the last axis,
            `(g, ...)`; the gradients themselves of leaves that are not factored, in
            their shape if there is one of them.
        cols: Its share of those over all other axes, `(g, n)`; None for leaves that are
            not factored.
    """

    rows: jax.Array
    cols: jax.Array | None


class Observed(NamedTuple):
    """The moments of equal leaves, and what is needed of them at once.

    Attributes:
        moments: For each leaf an array or a `Factored`, as they are kept.
        rows: Moments over the last axis next to their mean, `(g, ...)`; of leaves that
            are not factored all moments, in the shape of the leaf if there is one.
        cols: Moments over all other axes, `(g, n)`; None for leaves not factored.
        total: This device's share of the sum of the moments of these leaves, where all
            devices together count each once, over the number of parameters.
    """

    moments: list[Any]
    rows: jax.Array
    cols: jax.Array | None
    total: jax.Array


def sums(leaf: Leaf, factored: bool, values: list[jax.Array]) -> Sums:
    """Return the sums of the gradients of leaves like `leaf`.

    What is done with them is done for all leaves at once, for fewer kernels.
    """
    if not factors(leaf, factored):
        # What is alone may be as large as the model: it is left in its shape.
        return Sums(values[0] if len(values) == 1 else jnp.stack(values), None)
    squares = [_squares(value) for value in values]
    # Padding adds nothing, and is not counted.
    rows, cols = math.prod(leaf.whole[:-1]), leaf.whole[-1]
    above = tuple(range(len(leaf.shape) - 1))
    return Sums(
        jnp.stack([jnp.sum(x * (1 / cols), axis=-1) for x in squares]),
        jnp.stack([jnp.sum(x * (1 / rows), axis=above) for x in squares]),
    )


def observe(
    leaf: Leaf, layout: Layout, new: Sums, old: list[Any], weight: jax.Array
) -> Routine:
    """Return what is `Observed` of the sums of leaves like `leaf`."""
    # At least one, so that a tree whose arrays are all empty is a tree.
    all_entries = max(1, sum(math.prod(each.whole) for each in layout.leaves))
    devices = layout.ways(layout.axes)
    by_row, by_col = new
    if by_col is None:
        before = old[0] if len(old) == 1 else jnp.stack(old)
        moved = _towards(before, _squares(by_row), weight)
        copies = devices // layout.ways(leaf.axes)
        total = jnp.sum(moved.astype(layout.dtype) * (1 / (all_entries * copies)))
        each = [moved] if len(old) == 1 else list(jnp.unstack(moved))
        return Observed(each, moved, None, total)
    rows, cols = math.prod(leaf.whole[:-1]), leaf.whole[-1]
    if leaf.col_axes:
        by_row = yield lax.psum, by_row, leaf.col_axes
    new_rows = _towards(jnp.stack([each.rows for each in old]), by_row, weight)
    wide = new_rows.astype(layout.dtype)
    over_rows = tuple(range(1, wide.ndim))
    mean = jnp.sum(wide * (1 / rows), axis=over_rows, keepdims=True)
    if leaf.row_axes:
        both = jnp.concatenate([by_col, mean.reshape(-1, 1)], axis=1)
        both = yield lax.psum, both, leaf.row_axes
        by_col, mean = both[:, :-1], both[:, -1].reshape(mean.shape)
    new_cols = _towards(jnp.stack([each.cols for each in old]), by_col, weight)
    return Observed(
        moments=list(map(Factored, jnp.unstack(new_rows), jnp.unstack(new_cols))),
        rows=wide / jnp.where(mean > 0, mean, 1),
        cols=new_cols.astype(layout.dtype),
        total=jnp.sum(mean) * (rows * cols / (all_entries * devices)),
    )


def _squares(value: jax.Array) -> jax.Array:
    # They overflow for entries above 1e19, and vanish for those below 1e-19.
    limit = float(jnp.finfo(value.dtype).max) / 4
    squares = jnp.square(value.real)
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        squares = squares + jnp.square(value.imag)
    return jnp.where(jnp.isfinite(value), jnp.minimum(squares, limit), jnp.nan)


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
    squares, roots = functools.reduce(jnp.add, sums) / float(max(count, 1))
    share = roots**2 / jnp.where(squares > 0, squares, 1)
    spread = jnp.where(squares > 0, jnp.sqrt(jnp.maximum(1 - share, 0)), 0)
    return jnp.sqrt(state.mean), spread

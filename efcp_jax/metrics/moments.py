r"""Running second moments of the leaves of a gradient, whole or factored.

A leaf of two or more axes with entries $v_{ij}$, $j$ along the last axis and $i$ along
all others, is factored as in Adafactor: $v_{ij} \approx r_i c_j / \bar r$ from the
means $r_i$ over its rows and $c_j$ over its columns, which is exact where $v$ has rank
one.
"""

from collections.abc import Callable, Iterable
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.collectives import Routine
from efcp_jax.devices.layout import Layout, Leaf
from efcp_jax.numerics import cast, root


# Entries of a leaf that is not worth copying to be beside others.
_LARGE = 65_536


class Factored(NamedTuple):
    """Means of second moments of a leaf over its last axis, and over all others."""

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


def _sides(leaf: Leaf) -> tuple[int, int]:
    """Return rows and columns of the whole leaf; padding adds nothing to a sum."""
    return math.prod(leaf.whole[:-1]), leaf.whole[-1]


def factors(leaf: Leaf, factored: bool) -> bool:
    """Return whether the moments of `leaf` are factored: if that makes them smaller."""
    if not factored or len(leaf.whole) < 2:
        return False
    rows, cols = _sides(leaf)
    return rows + cols < rows * cols


def of_leaves(
    layout: Layout, factored: bool, axes: Callable[[Leaf], Any], make: Callable
) -> Any:
    """Return a tree of moments; `make` makes an array of some `axes` of a leaf."""

    def one(leaf: Leaf) -> Any:
        given = axes(leaf)
        if factors(leaf, factored):
            return Factored(make(given[:-1]), make(given[-1:]))
        return make(given)

    return layout.treedef.unflatten(map(one, layout.leaves))


class Group(NamedTuple):
    """Leaves that are alike: they are taken at once, in fewer kernels."""

    leaf: Leaf  # any of them
    indices: list[int]
    factored: bool

    def of(self, values: list[Any]) -> list[Any]:
        """Return the values of these leaves."""
        return [values[i] for i in self.indices]

    def stack(self, values: list[jax.Array]) -> jax.Array:
        """Return `values` as one array; what is alone, and may be large, as it is."""
        return jnp.stack(values) if len(values) > 1 else values[0]

    def split(self, array: jax.Array) -> list[jax.Array]:
        """Undo `stack`."""
        return list(jnp.unstack(array)) if len(self.indices) > 1 else [array]


def groups_of(layout: Layout, factored: bool) -> list[Group]:
    """Return the leaves in groups of equal ones, but for large ones not factored."""
    groups: dict[Any, Group] = {}
    for index, leaf in enumerate(layout.leaves):
        is_factored = factors(leaf, factored)
        alone = leaf.size > _LARGE and not is_factored
        key = index if alone else leaf
        groups.setdefault(key, Group(leaf, [], is_factored)).indices.append(index)
    return list(groups.values())


def in_order(groups: list[Group], values: Iterable[list[Any]]) -> list[Any]:
    """Return what each group has for its leaves, in the order of all leaves."""
    indices = itertools.chain.from_iterable(group.indices for group in groups)
    found = dict(zip(indices, itertools.chain.from_iterable(values), strict=True))
    return [found[index] for index in range(len(found))]


def sums_of(group: Group, values: list[jax.Array]) -> list[jax.Array]:
    """Return what these g gradients add to the moments; NaN if it is not finite.

    The squares, stacked; of factored leaves this device's share of their means over the
    last axis, `(g, ...)`, and over all others, `(g, n)`.
    """
    if not group.factored:
        return [_squares(group.stack(values))]
    squares = [_squares(value) for value in values]
    rows, cols = _sides(group.leaf)
    above = tuple(range(len(group.leaf.shape) - 1))
    return [
        jnp.stack([jnp.sum(x * (1 / cols), axis=-1) for x in squares]),
        jnp.stack([jnp.sum(x * (1 / rows), axis=above) for x in squares]),
    ]


class Observed(NamedTuple):
    """Moments of a group, what their roots are made of, and their share of the mean.

    Roots of the factors, rows over their mean `(g, ...)` and columns `(g, n)`, or the
    moments, stacked. All devices together count each parameter once.
    """

    moments: list[Any]
    made_of: Any
    total: jax.Array


def observe(
    group: Group, layout: Layout, new: list[jax.Array], old: list[Any], weight: Any
) -> Routine:
    """Return what is `Observed` of the sums of a group, all devices together."""
    leaf = group.leaf
    # At least one, so that a tree whose arrays are all empty is a tree.
    entries = max(1, sum(math.prod(each.whole) for each in layout.leaves))
    if not group.factored:
        moved = _towards(group.stack(old), new[0], weight)
        copies = layout.ways(layout.axes) // layout.ways(leaf.axes)
        total = jnp.sum(moved.astype(layout.dtype) * (1 / (entries * copies)))
        return Observed(group.split(moved), moved, total)
    by_row, by_col = new
    if leaf.col_axes:
        by_row = yield lax.psum, by_row, leaf.col_axes
    new_rows = _towards(jnp.stack([each.rows for each in old]), by_row, weight)
    wide = new_rows.astype(layout.dtype)
    rows, cols = _sides(leaf)
    over_rows = tuple(range(1, wide.ndim))
    mean = jnp.sum(wide * (1 / rows), axis=over_rows, keepdims=True)
    if leaf.row_axes:
        both = jnp.concatenate([by_col, mean.reshape(-1, 1)], axis=1)
        both = yield lax.psum, both, leaf.row_axes
        by_col, mean = both[:, :-1], both[:, -1].reshape(mean.shape)
    new_cols = _towards(jnp.stack([each.cols for each in old]), by_col, weight)
    row = wide / jnp.where(mean > 0, mean, 1)
    return Observed(
        list(map(Factored, jnp.unstack(new_rows), jnp.unstack(new_cols))),
        (root(row), root(new_cols.astype(layout.dtype))),
        jnp.sum(mean) * (rows * cols / (entries * layout.ways(layout.axes))),
    )


def _squares(value: jax.Array) -> jax.Array:
    # They overflow for entries above 1e19, and vanish for those below 1e-19.
    limit = float(jnp.finfo(value.dtype).max) / 4
    squares = (value * value.conj()).real
    return jnp.where(jnp.isfinite(value), jnp.minimum(squares, limit), jnp.nan)


def _towards(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """Return what lies `weight` of the way from `old` to `new`; `old` if it is 0."""
    before = old.astype(new.dtype)
    # What a gradient that is not accepted holds may be NaN.
    step = jnp.where(weight > 0, weight * (new - before), 0)
    return cast(before + step, old.dtype)

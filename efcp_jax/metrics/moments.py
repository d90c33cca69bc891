r"""Running second moments of the leaves of a gradient, whole or factored.

A leaf of two or more axes with entries $v_{ij}$, $j$ along the last axis and $i$ along
all others, is factored as in Adafactor: $v_{ij} \approx r_i c_j / \bar r$ from the
means $r_i$ over its rows and $c_j$ over its columns, which is exact where $v$ has rank
one.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax import passes
from efcp_jax.devices.collectives import Routine
from efcp_jax.devices.layout import Layout, Leaf
from efcp_jax.numerics import cast, root


class Factored(NamedTuple):
    """Means of second moments of a leaf over its last axis, and over all others."""

    rows: jax.Array
    cols: jax.Array


class MetricState(NamedTuple):
    """What a diagonal metric keeps.

    Attributes:
        mean: Mean of the moments over all parameters behind the last step; 0 before
            the first.
        moments: For the leaves of each shape, by name, those of g leaves in the order
            of the parameters: an array `(g, ...)`, or a `Factored` of two. One leaf
            alone that is not factored has an array of its shape.
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


def of_kinds(
    layout: Layout, factored: bool, axes: Callable[[int, Leaf], Any], make: Callable
) -> dict[str, Any]:
    """Return moments by kind; `make` makes an array of some `axes` of g leaves."""

    def one(kind: Kind) -> Any:
        first, *given = axes(len(kind.indices), kind.leaf)
        if kind.factored:
            return Factored(make((first, *given[:-1])), make((first, given[-1])))
        return make((*given,) if kind.bare else (first, *given))

    return {kind.name: one(kind) for kind in kinds_of(layout, factored)}


class Kind(NamedTuple):
    """Leaves that are alike, stacked: a step is as large as there are kinds of them."""

    name: str
    leaf: Leaf  # any of them
    indices: tuple[int, ...]
    factored: bool

    @property
    def bare(self) -> bool:
        """Whether there is one leaf, whose moments have its own shape."""
        return len(self.indices) == 1 and not self.factored


def kinds_of(layout: Layout, factored: bool) -> list[Kind]:
    """Return the kinds of leaves of a tree."""
    made = []
    for name, indices in layout.kinds.items():
        leaf = layout.leaves[indices[0]]
        made.append(Kind(name, leaf, indices, factors(leaf, factored)))
    return made


def sums_of(kind: Kind, leaves: list[jax.Array]) -> list[jax.Array]:
    """Return what g gradients add to the moments; NaN if one is not finite.

    The squares; of factored leaves this device's share of their means over the last
    axis, `(g, ...)`, and over all others, `(g, n)`.
    """
    if not kind.factored:
        return [_squares(leaves[0] if kind.bare else jnp.stack(leaves))]
    rows, cols = _sides(kind.leaf)

    def means(values: jax.Array) -> list[jax.Array]:
        squares = _squares(values)
        above = tuple(range(1, squares.ndim - 1))
        return [
            jnp.sum(squares * (1 / cols), axis=-1),
            jnp.sum(squares * (1 / rows), axis=above),
        ]

    return passes.of_stacked(means, leaves)


class Observed(NamedTuple):
    """Moments of a kind, what their roots are made of, and their share of the mean.

    Roots of the factors, rows over their mean `(g, ...)` and columns `(g, n)`, or the
    moments. All devices together count each parameter once.
    """

    moments: Any
    made_of: list[jax.Array]
    total: jax.Array


def observe(
    kind: Kind, layout: Layout, new: list[jax.Array], old: Any, weight: Any
) -> Routine:
    """Return what is `Observed` of the sums of a kind, all devices together."""
    leaf = kind.leaf
    # At least one, so that a tree whose arrays are all empty is a tree.
    entries = max(1, sum(math.prod(each.whole) for each in layout.leaves))
    if not kind.factored:
        moved = _towards(old, new[0], weight)
        copies = layout.ways(layout.axes) // layout.ways(leaf.axes)
        total = jnp.sum(moved.astype(layout.dtype) * (1 / (entries * copies)))
        return Observed(moved, [moved], total)
    by_row, by_col = new
    if leaf.col_axes:
        by_row = yield lax.psum, by_row, leaf.col_axes
    new_rows = _towards(old.rows, by_row, weight)
    wide = new_rows.astype(layout.dtype)
    rows, cols = _sides(leaf)
    over_rows = tuple(range(1, wide.ndim))
    mean = jnp.sum(wide * (1 / rows), axis=over_rows, keepdims=True)
    if leaf.row_axes:
        both = jnp.concatenate([by_col, mean.reshape(-1, 1)], axis=1)
        both = yield lax.psum, both, leaf.row_axes
        by_col, mean = both[:, :-1], both[:, -1].reshape(mean.shape)
    new_cols = _towards(old.cols, by_col, weight)
    row = wide / jnp.where(mean > 0, mean, 1)
    return Observed(
        Factored(new_rows, new_cols),
        [root(row), root(new_cols.astype(layout.dtype))],
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

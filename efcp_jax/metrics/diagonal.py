"""The metric of Adam and RMSprop: roots of running second moments of the gradient."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax import _validate, passes
from efcp_jax.devices.collectives import together
from efcp_jax.devices.layout import Layout
from efcp_jax.metrics.base import Measured
from efcp_jax.metrics.moments import (
    Group,
    MetricState,
    Observed,
    groups_of,
    in_order,
    observe,
    of_axes,
    sums_of,
)
from efcp_jax.numerics import root


@dataclasses.dataclass(frozen=True)
class DiagonalMetric:
    """Configuration of a diagonal metric; made by `diagonal_metric`.

    Attributes:
        decay: Decay of the moments.
        floor: What is added to the diagonal, whose mean is about one.
        factored: Whether the moments of matrices are kept as row and column means.
        dtype: Dtype of the moments; None for the working dtype.
    """

    decay: float = 0.95
    floor: float = 0.1
    factored: bool = True
    dtype: np.dtype | None = None

    def init(self, layout: Layout) -> MetricState:
        """Return moments of zero."""
        make = functools.partial(jnp.zeros, dtype=self.dtype or layout.dtype)
        each = (of_axes(x, self.factored, x.shape, make) for x in layout.leaves)
        return MetricState(jnp.zeros((), layout.dtype), layout.treedef.unflatten(each))

    def specs(self, layout: Layout) -> MetricState:
        """Return that moments are divided as the leaves are."""
        make = lambda axes: PartitionSpec(*(names or None for names in axes))
        each = (of_axes(x, self.factored, x.partition, make) for x in layout.leaves)
        mean: jax.Array = PartitionSpec()  # pyright: ignore[reportAssignmentType]
        return MetricState(mean, layout.treedef.unflatten(each))

    def measure(
        self,
        layout: Layout,
        tree: chex.ArrayTree,
        state: MetricState,
        seen: jax.Array,
        guarded: bool,
    ) -> Measured:
        """Return the metric of the moments up to this gradient; see `Metric`."""
        values, old = layout.wide(tree), layout.treedef.flatten_up_to(state.moments)
        groups = groups_of(layout, self.factored)
        sums = [sums_of(group, group.of(values)) for group in groups]
        finite = passes.all_finite(jax.tree.leaves(sums))
        # The mean of all gradients so far at first, later one that forgets.
        count = seen.astype(layout.dtype) + 1
        log = math.log(self.decay) if self.decay > 0 else -math.inf
        weight = (1 - self.decay) / -jnp.expm1(count * log)
        weight = jnp.where(finite, weight, 0) if guarded else weight
        weight = weight.astype(layout.dtype)
        observed: list[Observed] = together(
            observe(group, layout, new, group.of(old), weight)
            for group, new in zip(groups, sums, strict=True)
        )
        scale = _scale(state.mean, self.floor)
        shares = (each.total for each in observed)
        kept = in_order(groups, (each.moments for each in observed))
        return Measured(
            layout=layout,
            roots=lambda held: in_order(groups, map(_inverse_roots, groups, held)),
            arrays=[(each.made_of, *scale) for each in observed],
            finite=finite,
            moments=layout.treedef.unflatten(kept),
            share=functools.reduce(jnp.add, shares, jnp.zeros((), layout.dtype)),
        )


def _scale(mean: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
    """Return what a root of a moment is multiplied by, and what is added to it."""
    tiny = jnp.finfo(mean.dtype).tiny
    known = mean >= tiny
    inverse = jnp.where(known, 1 / jnp.sqrt(jnp.maximum(mean, tiny)), 0)
    # Flat while nothing is known.
    return inverse, jnp.where(known, 0, 1).astype(mean.dtype) + floor


def _inverse_roots(group: Group, held: Any) -> list[jax.Array]:
    """Return $D^{-1/2}$ of the leaves of a group."""
    made_of, inverse, shift = held
    if group.factored:
        rows, cols = map(jnp.unstack, made_of)
        near = (_near(col * inverse) for col in cols)
        axes = range(rows[0].ndim)
        diagonals = [
            row[..., None] * jnp.expand_dims(col, axes)
            for row, col in zip(rows, near, strict=True)
        ]
    else:
        wide = (x.astype(shift.dtype) for x in group.split(made_of))
        diagonals = [_near(root(x) * inverse) for x in wide]
    return [lax.rsqrt(diagonal + shift) for diagonal in diagonals]


def _near(x: jax.Array) -> jax.Array:
    # Far above all numbers that occur, so that no product overflows.
    return jnp.minimum(x, float(jnp.finfo(x.dtype).max) ** 0.25)


def diagonal_metric(
    decay: float = 0.95,
    floor: float = 0.1,
    *,
    factored: bool = True,
    dtype: jax.typing.DTypeLike | None = None,
) -> DiagonalMetric:
    r"""Measure gradients and updates in Adam's metric, with a floor.

    $D = \sqrt{v} / \mathrm{rms} + \mathrm{floor}$, where $v$ is the running mean of the
    squared gradient and $\mathrm{rms}$ the root of the mean of $v$ over all parameters.

    A transformation in the metric gets $D^{-1/2} g$ for a gradient $g$, and of its
    update $u'$ returns $D^{-1/2} u'$. A full-matrix preconditioner then corrects Adam's
    metric in place of the Euclidean one; compression keeps the entries that are large
    in it. As $D$ has a mean of about one and does not depend on the scale of the
    gradient, learning rates, `eps` and `damping` keep their units and sizes.

    Args:
        decay: Decay of $v$, in [0, 1). The mean is over all gradients at first, so
            nothing is biased towards zero.
        floor: Lower bound of $D$, at least 0 and relative to its mean. It keeps
            coordinates that hardly ever have a gradient from making large steps. Large
            values approach the Euclidean metric with steps smaller by the floor.
        factored: Whether to keep the means of $v$ over the rows and over the columns of
            each leaf of two or more axes, in place of $v$: next to no memory. The last
            axis is that of columns. False keeps every entry, as Adam does.
        dtype: Floating dtype of the moments. None keeps them in the working dtype
            (float32, or float64 for float64 parameters). In `jnp.bfloat16` moments
            stand still once they change by less than 0.4% a step: pass no `decay`
            above 0.99 with it.

    Returns:
        An immutable metric, for the argument `metric` of the transformations and for
        `in_metric`.

    Raises:
        TypeError: An argument is of the wrong type, or traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax
        >>> efcp_jax.diagonal_metric(floor=0.3)
        DiagonalMetric(decay=0.95, floor=0.3, factored=True, dtype=None)
        >>> tx = efcp_jax.sparse_ggt(1.0, metric=efcp_jax.diagonal_metric())

    References:
        Kingma and Ba, `Adam: A Method for Stochastic Optimization
        <https://arxiv.org/abs/1412.6980>`_, 2015

        Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory
        Cost <https://arxiv.org/abs/1804.04235>`_, 2018

    Notes:
        Memory: a number a row and a column of every matrix and one for every entry of a
        vector; 4 bytes a parameter if not factored. Time: two sums over the gradient.
        Over several devices the moments are divided as the parameters are, and whole on
        each device where those are replicated. $\mathrm{rms}$ is that of the step
        before, so that its mean travels in the one collective of a step; in the first
        step $D = 1 + \mathrm{floor}$. Sums over sharded matrices take a collective of a
        number a row or column in front. Moments saturate for entries above 1e19 and
        vanish below 1e-19 (in float32): there the metric is flat.
    """
    return DiagonalMetric(
        decay=_validate.number_now("decay", decay),
        floor=_validate.number_now("floor", floor),
        factored=_validate.boolean("factored", factored),
        dtype=_validate.floating_dtype("dtype", dtype),
    )

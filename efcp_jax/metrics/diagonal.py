"""The metric of Adam and RMSprop: roots of running second moments of the gradient."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax import _validate, passes
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.routines import together
from efcp_jax.metrics import moments
from efcp_jax.metrics.base import Measured, Root
from efcp_jax.metrics.moments import MetricState, Observed
from efcp_jax.numerics import root


# Entries of a leaf that is not worth copying to be beside others.
_LARGE = 65_536


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
        dtype = self.dtype or layout.dtype
        kept = [moments.zeros(leaf, self.factored, dtype) for leaf in layout.leaves]
        return MetricState(jnp.zeros((), layout.dtype), layout.treedef.unflatten(kept))

    def specs(self, layout: Layout) -> MetricState:
        """Return that moments are divided as the leaves are."""
        each = [moments.specs(leaf, self.factored) for leaf in layout.leaves]
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
        dtype = layout.dtype
        # The mean of all gradients so far at first, later one that forgets.
        count = seen.astype(dtype) + 1
        log = math.log(self.decay) if self.decay > 0 else -math.inf
        weight = (1 - self.decay) / -jnp.expm1(count * log)
        old = layout.treedef.flatten_up_to(state.moments)
        values, groups = layout.wide(tree), _groups(layout, self.factored)
        sums = [
            moments.sums(
                layout.leaves[group[0]], self.factored, [values[i] for i in group]
            )
            for group in groups
        ]
        finite = passes.all_finite(jax.tree.leaves(sums))
        weight = jnp.where(finite, weight, 0) if guarded else weight
        observed: list[Observed] = together(
            moments.observe(
                layout.leaves[group[0]],
                layout,
                each,
                [old[i] for i in group],
                weight.astype(dtype),
            )
            for group, each in zip(groups, sums, strict=True)
        )
        new: dict[int, Any] = {}
        roots: dict[int, Root] = {}
        for number, (group, each) in enumerate(zip(groups, observed, strict=True)):
            for place, index in enumerate(group):
                new[index] = each.moments[place]
                at = place if len(group) > 1 else ...
                full = functools.partial(_full, at)
                outer = functools.partial(_outer, place)
                roots[index] = Root(full if each.cols is None else outer, number)
        scale, order = _Scale.of(state.mean, self.floor), range(len(values))
        shares = (each.total for each in observed)
        return Measured(
            layout=layout,
            roots=[roots[i] for i in order],
            arrays=[scale.arrays(each) for each in observed],
            finite=finite,
            moments=layout.treedef.unflatten([new[i] for i in order]),
            share=functools.reduce(jnp.add, shares, jnp.zeros((), dtype)),
        )


class _Scale(NamedTuple):
    """What makes a diagonal of roots of moments: times `inverse`, plus `shift`."""

    inverse: jax.Array
    shift: jax.Array

    @classmethod
    def of(cls, mean: jax.Array, floor: float) -> "_Scale":
        tiny = jnp.finfo(mean.dtype).tiny
        known = mean >= tiny
        inverse = jnp.where(known, 1 / jnp.sqrt(jnp.where(known, mean, 1)), 0)
        # Flat while nothing is known.
        return cls(inverse, jnp.where(known, 0, 1).astype(mean.dtype) + floor)

    def arrays(self, observed: Observed) -> Any:
        """Return what the roots of equal leaves are made from."""
        if observed.cols is None:
            return observed.rows, self
        cols = _near(root(observed.cols) * self.inverse)
        return root(observed.rows), cols, self.shift


def _groups(layout: Layout, factored: bool) -> list[list[int]]:
    """Return the leaves in groups of equal ones, but for large ones not factored."""
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(layout.leaves):
        alone = leaf.size > _LARGE and not moments.factors(leaf, factored)
        groups.setdefault(index if alone else leaf, []).append(index)
    return list(groups.values())


def _full(place: Any, held: Any) -> jax.Array:
    """Return the inverse root of the diagonal of a leaf that is not factored."""
    squares, scale = held
    dtype = scale.shift.dtype
    share = root(squares[place].astype(dtype)) * scale.inverse
    return lax.rsqrt(_near(share) + scale.shift)


def _outer(place: int, held: Any) -> jax.Array:
    """Return the inverse root of the diagonal of a factored leaf."""
    rows, cols, shift = held
    row = rows[place]
    col = cols[place].reshape((1,) * row.ndim + (-1,))
    return lax.rsqrt(row[..., None] * col + shift)


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
    decay = _validate.number_now(
        "decay", decay, low=0.0, high=1.0, open_high=True, remedy="Pass 0.95."
    )
    floor = _validate.number_now("floor", floor, low=0.0, remedy="Pass 0.1.")
    return DiagonalMetric(
        decay=decay,
        floor=floor,
        factored=_validate.boolean("factored", factored),
        dtype=_validate.floating_dtype("dtype", dtype),
    )

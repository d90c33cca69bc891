r"""The metric of Adam and RMSprop: roots of running second moments of the gradient.

A step in it takes $g' = D^{-1/2} g$ in place of the gradient and returns $D^{-1/2} u'$
in place of its update $u'$: it is the plain step on the parameters
$\theta' = D^{1/2} \theta$.
"""

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax import _validate, passes
from efcp_jax.devices.collectives import together
from efcp_jax.devices.layout import Layout
from efcp_jax.metrics import moments
from efcp_jax.metrics.measured import Measured
from efcp_jax.metrics.moments import MetricState


@dataclasses.dataclass(frozen=True)
class DiagonalMetric:
    """Configuration of a diagonal metric: the arguments of `diagonal_metric`."""

    decay: float = 0.95
    floor: float = 0.1
    factored: bool = True
    dtype: np.dtype | None = None

    def init(self, layout: Layout) -> MetricState:
        """Return moments of zero."""
        make = lambda shape: jnp.zeros(shape, self.dtype or layout.dtype)
        shape = lambda count, leaf: (count, *leaf.shape)
        each = moments.of_kinds(layout, self.factored, shape, make)
        return MetricState(jnp.zeros((), layout.dtype), each)

    def specs(self, layout: Layout) -> MetricState:
        """Return that moments are divided as the leaves are."""
        make = lambda axes: PartitionSpec(*(names or None for names in axes))
        axes = lambda _, leaf: ((), *leaf.partition)
        mean: Any = PartitionSpec()
        return MetricState(mean, moments.of_kinds(layout, self.factored, axes, make))

    def measure(
        self,
        layout: Layout,
        tree: chex.ArrayTree,
        state: MetricState,
        seen: jax.Array,
        guarded: bool,
    ) -> Measured:
        """Return the metric of the moments up to the gradient `tree`.

        It is that behind `seen` others, and one that is not finite teaches nothing if
        `guarded`.
        """
        kinds = moments.kinds_of(layout, self.factored)
        sums = [*map(moments.sums_of, kinds, layout.by_kind(layout.wide(tree)))]
        finite = passes.all_finite(jax.tree.leaves(sums))
        # The mean of all gradients so far at first, later one that forgets.
        count = seen.astype(layout.dtype) + 1
        log = math.log(self.decay) if self.decay > 0 else -math.inf
        weight = (1 - self.decay) / -jnp.expm1(count * log)
        weight = jnp.where(finite, weight, 0) if guarded else weight
        weight = weight.astype(layout.dtype)
        observed: list[moments.Observed] = together(
            moments.observe(kind, layout, new, state.moments[kind.name], weight)
            for kind, new in zip(kinds, sums, strict=True)
        )
        tiny = jnp.finfo(layout.dtype).tiny
        known, mean = state.mean >= tiny, jnp.maximum(state.mean, tiny)
        inverse = jnp.where(known, 1 / jnp.sqrt(mean), 0)
        # Flat while nothing is known.
        shift = jnp.where(known, 0, 1).astype(layout.dtype) + self.floor
        return Measured(
            layout=layout,
            factored=self.factored,
            arrays=[(each.made_of, inverse, shift) for each in observed],
            finite=finite,
            moments={k.name: x.moments for k, x in zip(kinds, observed, strict=True)},
            share=sum((x.total for x in observed), jnp.zeros((), layout.dtype)),
        )


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
    update $u'$ returns $D^{-1/2} u'$: a full-matrix preconditioner corrects Adam's
    metric, and compression keeps what is large in it. As $D$ has a mean of about one,
    whatever the scale of the gradient, learning rates, `eps` and `damping` keep theirs.

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
        Over several devices the moments are divided as the parameters are, and sums
        over sharded matrices take a collective of a number a row or column.
        $\mathrm{rms}$ is that of the step before, so that its mean travels in the one
        collective of a step; in the first $D = 1 + \mathrm{floor}$. In float32, moments
        saturate for entries above 1e19 and vanish below 1e-19: there $D$ is flat.
    """
    return DiagonalMetric(
        decay=_validate.number_now("decay", decay),
        floor=_validate.number_now("floor", floor),
        factored=_validate.boolean("factored", factored),
        dtype=_validate.floating_dtype("dtype", dtype),
    )

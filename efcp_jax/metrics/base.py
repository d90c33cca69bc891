r"""The protocol between metrics and the steps that are made in them.

A metric is a positive number $D_i$ for every parameter. A step in the metric takes
$g' = D^{-1/2} g$ in place of the gradient and returns $D^{-1/2} u'$ in place of its
update $u'$: it is the plain step on the parameters $\theta' = D^{1/2} \theta$.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import chex
import jax
from jax import lax

from efcp_jax.devices.layout import Layout
from efcp_jax.metrics.moments import MetricState


class Measured(NamedTuple):
    r"""What a metric says of one gradient.

    Attributes:
        layout: The leaves of the tree on this device.
        roots: From `arrays` to $D^{-1/2}$ of every leaf, in order, each of a shape that
            broadcasts to the leaf's.
        arrays: What the roots are made from: small, or kept anyway.
        finite: Whether all entries of the gradient on this device are finite.
        moments: What the metric has learned, or None.
        share: This device's share of the mean of the moments over all parameters, or
            None.
    """

    layout: Layout
    roots: Callable[[Any], list[jax.Array]]
    arrays: Any
    finite: jax.Array
    moments: Any = None
    share: jax.Array | None = None

    def behind(self, value: Any) -> tuple["Measured", Any]:
        """Return the metric as what is known behind `value`, and `value`.

        So that no compiler keeps the roots from the way in for the way out, which would
        be a temporary of the size of the model.
        """
        arrays, value = lax.optimization_barrier((self.arrays, value))
        return self._replace(arrays=arrays), value

    def state(self, mean: jax.Array | None) -> MetricState | None:
        """Return what is kept, given the mean of the moments; None for nothing."""
        return None if mean is None else MetricState(mean, self.moments)

    def scaled(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        r"""Return $D^{-1/2}$ times the leaves of `tree`, in the working dtype."""
        pairs = zip(self.layout.wide(tree), self.roots(self.arrays), strict=True)
        return self.layout.treedef.unflatten(leaf * root for leaf, root in pairs)


@runtime_checkable
class Metric(Protocol):
    """Immutable configuration of a metric."""

    def init(self, layout: Layout) -> Any:
        """Return what is known before the first gradient; None if nothing is kept."""
        ...

    def specs(self, layout: Layout) -> Any:
        """Return the `PartitionSpec` of each array that `init` returns."""
        ...

    def measure(
        self,
        layout: Layout,
        tree: chex.ArrayTree,
        state: Any,
        seen: jax.Array,
        guarded: bool,
    ) -> Measured:
        """Return the metric of a gradient.

        Args:
            layout: The leaves of the tree on this device.
            tree: The gradient.
            state: What is known from the gradients before it.
            seen: How many those are.
            guarded: Whether to learn nothing from it if it is not finite.
        """
        ...


def optional(metric: Any) -> Metric | None:
    """Return `metric`, which may be None, or raise if it is something else."""
    return None if metric is None else required(metric)


def required(metric: Any) -> Metric:
    """Return `metric`, or raise if it is none."""
    if not isinstance(metric, Metric):
        raise TypeError(
            f"`metric` must be a metric, got {metric!r}. Pass"
            " `efcp_jax.diagonal_metric()`."
        )
    return metric

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


class Root(NamedTuple):
    """What the inverse root of the diagonal of one leaf is computed from.

    Attributes:
        make: From `arrays` to $D^{-1/2}$, of a shape that broadcasts to the leaf's.
        arrays: A tree of arrays, small or kept anyway.
    """

    make: Callable[[Any], jax.Array]
    arrays: Any


class Measured(NamedTuple):
    r"""What a metric says of one gradient.

    Attributes:
        layout: The leaves of the tree on this device.
        roots: One for every leaf, in order.
        moments: What the metric has learned, or None.
        share: This device's share of the mean of the moments over all parameters, or
            None.
    """

    layout: Layout
    roots: list[Root]
    moments: Any
    share: jax.Array | None

    def inward(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        r"""Return $D^{-1/2} g$ of the gradients `tree`, in the working dtype."""
        return self._scaled(self.layout.wide(tree), [r.arrays for r in self.roots])

    def outward(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        r"""Return $D^{-1/2} u'$ of the updates `tree`, in the working dtype."""
        # Behind the update, so that no compiler keeps the roots from the way in, which
        # would be a temporary of the size of the model.
        arrays = [root.arrays for root in self.roots]
        return self._scaled(*lax.optimization_barrier((self.layout.wide(tree), arrays)))

    def _scaled(self, leaves: list[jax.Array], arrays: list[Any]) -> chex.ArrayTree:
        scaled = (
            leaf * root.make(held)
            for leaf, root, held in zip(leaves, self.roots, arrays, strict=True)
        )
        return self.layout.treedef.unflatten(scaled)


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
        accept: jax.Array,
    ) -> Measured:
        """Return the metric of a gradient.

        Args:
            layout: The leaves of the tree on this device.
            tree: The gradient.
            state: What is known from the gradients before it.
            seen: How many those are.
            accept: Whether to learn from this one.

        Returns:
            The metric.
        """
        ...


def required(metric: Any) -> Metric:
    """Return `metric`, or raise if it is none."""
    if not isinstance(metric, Metric):
        raise TypeError(
            f"`metric` must be a metric, got {metric!r}. Pass"
            " `efcp_jax.diagonal_metric()`."
        )
    return metric

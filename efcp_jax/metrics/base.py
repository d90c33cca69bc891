r"""What a metric says of a gradient, and the metric that is known beforehand.

A metric is a positive number $D_i$ for every parameter. A step in the metric takes
$g' = D^{-1/2} g$ in place of the gradient and returns $D^{-1/2} u'$ in place of its
update $u'$: it is the plain step on the parameters $\theta' = D^{1/2} \theta$.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax import _validate, passes
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.trees import Prefix, broadcast, names_of
from efcp_jax.metrics.moments import MetricState


class Measured(NamedTuple):
    r"""What a metric says of one gradient, as seen by this device.

    `roots` makes $D^{-1/2}$ of every leaf, in order and to be broadcast, from `arrays`,
    which are small or kept anyway. `share` is that of the mean of the moments.
    """

    layout: Layout
    roots: Callable[[Any], list[jax.Array]]
    arrays: Any
    finite: jax.Array
    moments: Any = None
    share: jax.Array | None = None

    def behind(self, value: Any) -> tuple["Measured", Any]:
        """Return the metric as what is known behind `value`, and `value`.

        Else compilers keep the roots for the way out, as large as the model.
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


@dataclasses.dataclass(frozen=True)
class FixedMetric:
    """Configuration of a fixed metric, made by `fixed_metric`: numbers for branches."""

    diagonal: Prefix

    def init(self, layout: Layout) -> None:
        """Return nothing: there is nothing to learn."""

    def specs(self, layout: Layout) -> None:
        """Return nothing."""

    def measure(self, layout: Layout, tree: chex.ArrayTree, *_: Any) -> Measured:
        """Return the numbers given for the leaves."""
        given = broadcast(
            self.diagonal,
            tree,
            lambda name, _: ValueError(
                f"`diagonal` has no entry for the parameter {name}. Give it a positive"
                " number; 1.0 leaves it as it is."
            ),
        )
        roots = [jnp.asarray(1 / math.sqrt(each), layout.dtype) for each in given]
        finite = passes.all_finite(layout.wide(tree))
        return Measured(layout, lambda held: held, roots, finite)


def fixed_metric(diagonal: Any) -> FixedMetric:
    r"""Measure gradients and updates in a metric that is known beforehand.

    $g' = D^{-1/2} g$ and $u = D^{-1/2} u'$ with a number $D$ for each parameter array:
    the plain step on parameters in other units, $\theta' = D^{1/2} \theta$.

    Args:
        diagonal: Positive numbers, one for each leaf or subtree of the parameters, as a
            tree prefix. A leaf with $D = 4$ makes steps as if it were given in a unit
            half as large: by a quarter of the length for the same gradient.

    Returns:
        An immutable metric, for the argument `metric` of the transformations and for
        `in_metric`.

    Raises:
        TypeError: `diagonal` holds something else than numbers.
        ValueError: A number is not positive and finite.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp, optax
        >>> metric = efcp_jax.fixed_metric({"seconds": 1.0, "metres": 4.0})
        >>> tx = efcp_jax.in_metric(optax.sgd(1.0), metric)
        >>> params = {"metres": jnp.zeros(1), "seconds": jnp.zeros(1)}
        >>> gradient = {"metres": jnp.ones(1), "seconds": jnp.ones(1)}
        >>> updates, _ = tx.update(gradient, tx.init(params), params)
        >>> print(updates["metres"], updates["seconds"])
        [-0.25] [-1.]

    Notes:
        No memory, and a multiplication on the way in and on the way out.
    """
    given = jax.tree_util.tree_leaves_with_path(diagonal)
    if not given:
        raise ValueError(
            "`diagonal` must hold positive numbers, got an empty tree. Pass a number,"
            " or one for each leaf of the parameters."
        )
    check = _validate.number_now
    return FixedMetric(tuple((names_of(p), check("diagonal", x)) for p, x in given))

"""Any Optax transformation in a metric."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from efcp_jax import _validate, _validate_trees
from efcp_jax.devices import placement
from efcp_jax.devices.trees import strip_boxes
from efcp_jax.metrics import DiagonalMetric, Measured, MetricState, required
from efcp_jax.numerics import cast
from efcp_jax.protocol import working_dtype


class InMetricState(NamedTuple):
    """State of `in_metric`.

    Attributes:
        count: Number of finite gradients so far, int32.
        metric: The moments of the metric.
        inner: The state of the transformation.
    """

    count: jax.Array
    metric: MetricState
    inner: optax.OptState


def in_metric(
    tx: optax.GradientTransformation, metric: DiagonalMetric
) -> optax.GradientTransformationExtraArgs:
    r"""Let a transformation work in a metric.

    $u = D^{-1/2}\, \mathrm{tx}(D^{-1/2} g)$. With `efcp_jax.diagonal_metric`, Muon and
    other optimizers that treat directions alike see gradients whose entries have been
    evened out, as Adam's updates have.

    Args:
        tx: Any gradient transformation. Weight decay that is part of it would be in the
            metric as well; chain it behind.
        metric: `diagonal_metric(...)`.

    Returns:
        A gradient transformation with an `InMetricState`. A gradient with an entry that
        is not finite is handed on, and does not change the metric.

    Raises:
        TypeError: `tx` is not a gradient transformation, or `metric` not a metric.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp, optax
        >>> tx = efcp_jax.in_metric(optax.sgd(0.1), efcp_jax.diagonal_metric())
        >>> params = jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.array([4.0, 3.0]), state, params)
        >>> print(f"{updates[0]:.3f}")  # D = 4 / 3.54 + 0.1
        -0.325

    Notes:
        Memory and time are those of the metric. The transformations of this package
        take `metric` as an argument, which makes the same step in fewer passes.
    """
    tx = optax.with_extra_args_support(_validate.transformation(tx))
    metric = required(metric)

    def measure(tree: chex.ArrayTree, state, seen) -> Measured:
        layout = placement.layout(tree, working_dtype(tree), None)
        held: Any = metric.init(layout) if state is None else state
        return metric.measure(layout, tree, held, seen, True)

    def init_fn(params) -> Any:
        plain, count = strip_boxes(params), jnp.zeros((), jnp.int32)
        _validate_trees.floating_leaves(plain)
        # Arrays on a mesh are in a state as they come out of this.
        measured = measure(jax.tree.map(jnp.zeros_like, plain), None, count)
        return InMetricState(count, measured.state(measured.share), tx.init(params))

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        plain = strip_boxes(updates)
        _validate_trees.floating_leaves(plain, "updates")
        measured = measure(plain, state.metric, state.count)
        inner_updates, inner = tx.update(
            _scaled(measured, updates), state.inner, params, **extra_args
        )
        behind, inner_updates = measured.behind(inner_updates)
        count = optax.safe_increment(state.count)
        return _scaled(behind, inner_updates), InMetricState(
            count=jnp.where(measured.finite, count, state.count),
            metric=measured.state(measured.share),
            inner=inner,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scaled(measured: Measured, tree: chex.ArrayTree) -> chex.ArrayTree:
    """Return `tree` in the metric, in its own dtypes and boxes."""
    leaves, treedef = jax.tree.flatten(tree)
    scaled = jax.tree.leaves(measured.scaled(strip_boxes(tree)))
    pairs = zip(scaled, leaves, strict=True)
    return treedef.unflatten(cast(new, jnp.result_type(old)) for new, old in pairs)

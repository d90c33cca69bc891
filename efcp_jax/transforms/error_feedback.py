"""Compression with error feedback alone."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from efcp_jax._docstrings import documented
from efcp_jax.compressors import Compressor, Space
from efcp_jax.feedback import Feedback
from efcp_jax.metrics import DiagonalMetric, MetricState
from efcp_jax.protocol import Step
from efcp_jax.step import checked


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`; the fields are as in `ScaleByMfacState`."""

    count: jax.Array
    skipped: jax.Array
    error: chex.ArrayTree
    basis: chex.ArrayTree | None
    metric: MetricState | None = None


@documented()
def error_feedback(
    compressor: Compressor | None = None,
    *,
    metric: DiagonalMetric | None = None,
    error_dtype: jax.typing.DTypeLike | None = None,
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Compress the gradient and add what was dropped to the next one.

    $a_t = e_t + g_t$, emitted $c_t = C(a_t)$, $e_{t+1} = a_t - c_t$, $e_0 = 0$.

    Put it in front of any optimizer to train on compressed gradients.

    %(arguments)s

    Returns:
        A gradient transformation with an `ErrorFeedbackState`.

    %(raises)s

    Examples:
        >>> import efcp_jax, jax.numpy as jnp, optax
        >>> tx = optax.chain(efcp_jax.error_feedback(efcp_jax.top_k(0.25)),
        ...                  optax.sgd(1.0))
        >>> params = jnp.zeros(4)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jnp.array([4., 3., 1., 1.]), state, params)
        >>> print(updates)
        [-4. -0. -0. -0.]
        >>> updates, state = tx.update(jnp.array([0., 3., 1., 1.]), state, params)
        >>> print(updates)
        [-0. -6. -0. -0.]

    %(paper)s

    Notes:
        Memory: the error, 4 bytes a parameter. Time: one compression.
        Derivatives: of what is kept and of what is left; what is selected is a
        constant. With errors or values of 8 bits they raise.
    """
    feedback = checked(compressor, metric, error_dtype, skip_nonfinite)
    step = Step(
        feedback.compressor,
        lambda space: ErrorFeedbackState(**feedback.init(space)),
        lambda space: ErrorFeedbackState(**feedback.specs(space)),
        functools.partial(_step, feedback),
        {},
        sharding,
    )
    return step.transformation


def _step(
    feedback: Feedback, space: Space, updates: Any, state: Any, _: dict
) -> tuple[Any, ErrorFeedbackState]:
    new = feedback.take(space, updates, state)
    fault = jnp.where(new.finite, 0, 1).astype(space.layout.dtype)
    fault = fault if feedback.skip_nonfinite else None
    faults, share = space.layout.sum((fault, new.share))
    accept = jnp.asarray(True) if faults is None else faults == 0

    def update(scale: jax.Array) -> Any:
        scaled = lambda c: jnp.where(accept, c * scale, 0)
        return space.unpack(jax.tree.map(scaled, space.expand(new.row)))

    updates = new.outward(update, new.scale)
    return updates, ErrorFeedbackState(**new.kept(accept, share, state))

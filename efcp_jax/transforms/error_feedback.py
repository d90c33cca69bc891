"""Compression with error feedback alone."""

from typing import Any

import jax
import optax

from efcp_jax.compressors import Compressor
from efcp_jax.metrics import Metric
from efcp_jax.step import compressed


def error_feedback(
    compressor: Compressor | None = None,
    *,
    metric: Metric | None = None,
    error_dtype: jax.typing.DTypeLike | None = None,
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Compress the gradient and add what was dropped to the next one.

    $a_t = e_t + g_t$, emitted $c_t = C(a_t)$, $e_{t+1} = a_t - c_t$, $e_0 = 0$.

    Put it in front of any optimizer to train on compressed gradients.

    Args:
        compressor: `identity()`, `top_k(...)` or `low_rank(...)`. None is `identity()`.
        metric: What gradients and updates are measured in, `diagonal_metric(...)` or
            `fixed_metric(...)`: the step is made on $D^{-1/2} g_t$, and the update
            multiplied by $D^{-1/2}$. None for the Euclidean metric.
        error_dtype: Dtype in which the error is kept. None keeps it in the working
            dtype (float32, or float64 for float64 parameters), in which no part of a
            gradient is lost; `jnp.bfloat16` halves it and loses its rounding;
            `jnp.int8` keeps a byte an entry and a power of two a block, rounded at
            random so that in the mean nothing is lost.
        skip_nonfinite: Whether a gradient with an entry that is not finite leaves the
            error as it is and emits zeros. False lets such entries through.
        sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for
            every leaf, as a tree prefix. None takes it from the arrays' types under
            Explicit mesh axes; under Auto axes it spreads the step over the mesh in a
            way of its own, see `efcp_jax.sharding`.

    Returns:
        A gradient transformation with an `ErrorFeedbackState`.

    Raises:
        TypeError: An argument is of the wrong type, or traced.
        ValueError: An argument is out of range.

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

    References:
        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        Memory: the error, 4 bytes a parameter. Time: one compression.
        Derivatives: of what is kept and of what is left; what is selected is a
        constant. With errors or values of 8 bits they raise.
    """
    return compressed(
        compressor=compressor,
        metric=metric,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )

"""Compression with error feedback alone."""

from typing import Any

import jax
import optax

from efcp_jax._docstrings import documented
from efcp_jax.compressors import Compressor
from efcp_jax.metrics import Metric
from efcp_jax.step import compressed


@documented()
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

    References:
        %(efcp_paper)s

    Notes:
        Memory: the error, 4 bytes a parameter. Time: one compression.
    """
    return compressed(
        compressor=compressor,
        metric=metric,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )

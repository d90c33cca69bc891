"""M-FAC over a window of gradients."""

from typing import Any, Literal

import chex
import jax
import optax

from efcp_jax import compressors
from efcp_jax._docstrings import MFAC, OPTIMIZER, documented
from efcp_jax.metrics import DiagonalMetric
from efcp_jax.optimizers import chain
from efcp_jax.transforms import scale_by_mfac


@documented(MFAC, OPTIMIZER)
def mfac(
    learning_rate: optax.ScalarOrSchedule,
    window_size: int | None = None,
    damping: optax.ScalarOrSchedule | None = None,
    momentum: optax.ScalarOrSchedule | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    relative: bool = False,
    b1: chex.Numeric = 0.0,
    nesterov: bool = False,
    block_diagonal: bool = False,
    metric: DiagonalMetric | Literal["auto"] | None = "auto",
    value_dtype: jax.typing.DTypeLike | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    divisor: str = "window_size",
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent with the damped empirical Fisher matrix.

    $$\theta \leftarrow
    \theta - \eta\, [(\lambda I + G^T G / m)^{-1} c_t + w \theta]$$

    The rows of $G$ are the last $m$ gradients and $c_t$ is the newest.

    %(arguments)s

    %(an_optimizer)s

    Examples:
        >>> import efcp_jax, jax, jax.numpy as jnp, optax
        >>> tx = efcp_jax.mfac(1 / 16, window_size=16)
        >>> params = jnp.zeros(3)
        >>> state, step = tx.init(params), jax.jit(tx.update)
        >>> for _ in range(60):
        ...     updates, state = step(2 * (params - 1), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.all(jnp.abs(params - 1) < 0.2))
        True

    %(mfac_papers)s

    Notes:
        Memory: 4 m bytes a parameter, and the metric's. Time: two passes over the
        window, and m^3 / 3 operations.
    """
    scaled = scale_by_mfac(
        window_size,
        damping,
        relative=relative,
        b1=b1,
        nesterov=nesterov,
        divisor=divisor,
        compressor=compressors.identity(value_dtype=value_dtype),
        block_diagonal=block_diagonal,
        metric=chain.metric_of(metric, damping, relative),
        error_feedback=error_feedback,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )
    return chain.with_learning_rate(scaled, learning_rate, momentum, weight_decay, mask)

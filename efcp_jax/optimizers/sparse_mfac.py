"""M-FAC on sparse gradients with error feedback."""

from typing import Any, Literal

import chex
import jax
import optax

from efcp_jax._docstrings import MFAC, OPTIMIZER, SPARSE, documented
from efcp_jax.metrics import DiagonalMetric
from efcp_jax.optimizers import chain
from efcp_jax.transforms import scale_by_mfac


@documented(MFAC, OPTIMIZER, SPARSE)
def sparse_mfac(
    learning_rate: optax.ScalarOrSchedule,
    window_size: int | None = None,
    density: float | None = None,
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
    block_size: int | None = None,
    value_dtype: jax.typing.DTypeLike | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    divisor: str = "window_size",
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""M-FAC on sparse gradients with error feedback.

    $$\theta \leftarrow
    \theta - \eta\, [(\lambda I + G^T G / m)^{-1} c_t + w \theta]$$

    The rows of $G$ are the last $m$ compressed gradients and $c_t$ is the newest:
    of each block the entries of largest magnitude, the rest being added to the next
    gradient.

    %(arguments)s

    %(an_optimizer)s

    Examples:
        >>> import efcp_jax, jax, jax.numpy as jnp, optax
        >>> decay = optax.cosine_decay_schedule(1 / 16, 60)
        >>> tx = efcp_jax.sparse_mfac(decay, window_size=16)
        >>> params = jnp.zeros(3)
        >>> state, step = tx.init(params), jax.jit(tx.update)
        >>> for _ in range(60):
        ...     updates, state = step(2 * (params - 1), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.all(jnp.abs(params - 1) < 0.2))
        True

    %(mfac_papers)s

    Notes:
        Memory: 2 bytes a parameter for the error and m density times 3 for the window
        (4 and 5 with float32, 1 and 2 with 8 bits), and the metric's. Time: a
        selection, two passes over the window, and m^3 / 3 operations.
    """
    scaled = scale_by_mfac(
        window_size,
        damping,
        relative=relative,
        b1=b1,
        nesterov=nesterov,
        divisor=divisor,
        compressor=chain.sparse(density, block_size, value_dtype),
        block_diagonal=block_diagonal,
        metric=chain.metric_of(metric, damping, relative),
        error_feedback=error_feedback,
        error_dtype=chain.stored_dtype(error_dtype, density),
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )
    return chain.with_learning_rate(scaled, learning_rate, momentum, weight_decay, mask)

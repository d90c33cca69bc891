"""Full-matrix Adagrad on low-rank gradients with error feedback."""

from typing import Any, Literal

import chex
import jax
import optax

from efcp_jax import compressors
from efcp_jax._docstrings import GGT, OPTIMIZER, documented
from efcp_jax.metrics import DiagonalMetric
from efcp_jax.optimizers import chain
from efcp_jax.transforms import scale_by_ggt


@documented(GGT, OPTIMIZER)
def low_rank_ggt(
    learning_rate: optax.ScalarOrSchedule,
    window_size: int | None = None,
    rank: int | None = None,
    eps: optax.ScalarOrSchedule | None = None,
    b1: chex.Numeric = 0.0,
    b2: chex.Numeric = 1.0,
    momentum: optax.ScalarOrSchedule | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    relative: bool = False,
    nesterov: bool = False,
    metric: DiagonalMetric | Literal["auto"] | None = "auto",
    block_diagonal: bool = False,
    value_dtype: jax.typing.DTypeLike | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Full-matrix Adagrad on low-rank gradients with error feedback.

    $$\theta \leftarrow
    \theta - \eta\, [((G^T G)^{1/2} + \epsilon I)^{-1} c_t + w \theta]$$

    The rows of $G$ are the last $m$ compressed gradients and $c_t$ is the newest:
    a projection of every matrix to low rank, the rest being added to the next
    gradient.

    %(arguments)s

    %(an_optimizer)s

    Examples:
        >>> import efcp_jax, jax, jax.numpy as jnp, optax
        >>> tx = efcp_jax.low_rank_ggt(0.3, window_size=16)
        >>> params = jnp.zeros(3)
        >>> state, step = tx.init(params), jax.jit(tx.update)
        >>> for _ in range(60):
        ...     updates, state = step(2 * (params - 1), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.all(jnp.abs(params - 1) < 0.2))
        True

    %(ggt_papers)s

    Notes:
        Memory: 4 bytes a parameter for the error and m r (rows + cols) values a matrix
        for the window, and the metric's. Time: two products of every matrix with r
        columns, two passes over the window, and about 10 m^3 operations.
    """
    scaled = scale_by_ggt(
        window_size,
        eps,
        relative=relative,
        b1=b1,
        b2=b2,
        nesterov=nesterov,
        compressor=compressors.low_rank(
            4 if rank is None else rank, value_dtype=value_dtype
        ),
        block_diagonal=block_diagonal,
        metric=chain.metric_of(metric, eps, relative),
        error_feedback=error_feedback,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )
    return chain.with_learning_rate(scaled, learning_rate, momentum, weight_decay, mask)

"""M-FAC on low-rank gradients with error feedback."""

from typing import Any, Literal

import chex
import jax
import optax

from efcp_jax import compressors
from efcp_jax.metrics import Metric
from efcp_jax.optimizers.chain import metric_of, with_learning_rate
from efcp_jax.transforms import scale_by_mfac


def low_rank_mfac(
    learning_rate: optax.ScalarOrSchedule,
    window_size: int | None = None,
    rank: int | None = None,
    damping: optax.ScalarOrSchedule | None = None,
    momentum: optax.ScalarOrSchedule | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    relative: bool = False,
    b1: chex.Numeric = 0.0,
    nesterov: bool = False,
    metric: Metric | Literal["auto"] | None = "auto",
    block_diagonal: bool = False,
    value_dtype: jax.typing.DTypeLike | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    divisor: str = "window_size",
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""M-FAC on low-rank gradients with error feedback.

    $$\theta \leftarrow
    \theta - \eta\, [(\lambda I + G^T G / m)^{-1} c_t + w \theta]$$

    The rows of $G$ are the last $m$ compressed gradients and $c_t$ is the newest:
    a projection of every matrix to low rank, the rest being added to the next
    gradient.

    Args:
        learning_rate: Step size; a number or a schedule. A step along the newest row is
            about $m$ long in units of that row's inverse norm, so values near
            $1 / m$ are natural: `1 / 64` for the default window.
        window_size: Number of gradients $m$ kept, at least 1; None for 64.
        rank: Columns of the factors of every matrix, at least 1; None for 4. Leaves
            that such factors would not make smaller are kept whole.
        damping: $\lambda > 0$ of $(\lambda I + G^T G / m)^{-1}$, in the unit of a
            squared gradient entry; a number or a schedule. Large values approach
            gradient descent. None for 0.1 with `relative=True`.
        momentum: Decay of a trace of the updates, in [0, 1); a number or a schedule.
            None or 0 for none, without a buffer.
        weight_decay: Decoupled weight decay, at least 0, multiplied by the learning
            rate; a number or a schedule.
        mask: Tree of booleans, or a function from parameters to one, that says which
            leaves decay; None for all.
        relative: Whether damping is in units of the mean squared norm of the window's
            rows over m, and the update in units of its root, so that the scale of the
            loss does not matter; see `scale_by_mfac`.
        b1: Decay of a first moment over the window, in [0, 1).
        nesterov: Whether that moment looks ahead.
        metric: What gradients and updates are measured in, `diagonal_metric(...)` or
            `fixed_metric(...)`: the step is made on $D^{-1/2} g_t$, and the update
            multiplied by $D^{-1/2}$. None for the Euclidean metric. `"auto"` for
            `diagonal_metric()` where damping is None or `relative=True`, and for None
            where damping is in the published unit.
        block_diagonal: Whether every leaf has a Gram matrix of its own, instead of one
            for the whole gradient.
        value_dtype: Floating dtype of the stored rows; None for the working dtype.
        error_feedback: Whether what compression drops is added to the next gradient.
        error_dtype: Dtype of the error, floating or `jnp.int8`; None for the working
            dtype. See `scale_by_mfac`.
        divisor: `"window_size"` or `"filled"`, what the Fisher matrix divides by.
        skip_nonfinite: Whether gradients with entries that are not finite are skipped.
        sharding: Where the parameters live; see `scale_by_mfac`.

    Returns:
        A gradient transformation to be passed to the training loop like any of Optax's.

    Raises:
        TypeError: An argument is of the wrong type, or a structural one is traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax, jax, jax.numpy as jnp, optax
        >>> tx = efcp_jax.low_rank_mfac(1 / 16, window_size=16)
        >>> params = jnp.zeros(3)
        >>> def step(_, carry):
        ...     params, state = carry
        ...     updates, state = tx.update(2 * (params - 1), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> params, _ = jax.lax.fori_loop(0, 60, step, (params, tx.init(params)))
        >>> bool(jnp.all(jnp.abs(params - 1) < 0.2))
        True

    References:
        Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
        Information <https://arxiv.org/abs/2107.03356>`_, 2021

        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        Memory: 4 bytes a parameter for the error and m r (rows + cols) values a matrix
        for the window, and the metric's. Time: two products of every matrix with r
        columns, two passes over the window, and m^3 / 3 operations.
    """
    scale = scale_by_mfac(
        window_size,
        damping,
        relative=relative,
        b1=b1,
        nesterov=nesterov,
        divisor=divisor,
        compressor=compressors.low_rank(
            4 if rank is None else rank, value_dtype=value_dtype
        ),
        block_diagonal=block_diagonal,
        metric=metric_of(metric, damping, relative),
        error_feedback=error_feedback,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )
    return with_learning_rate(scale, learning_rate, momentum, weight_decay, mask)

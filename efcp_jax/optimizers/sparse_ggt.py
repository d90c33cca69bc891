"""Full-matrix Adagrad on sparse gradients with error feedback."""

from typing import Any, Literal

import chex
import jax
import optax

from efcp_jax import compressors
from efcp_jax.metrics import Metric
from efcp_jax.optimizers.chain import (
    BLOCK_SIZE,
    DENSITY,
    metric_of,
    stored_dtype,
    with_learning_rate,
)
from efcp_jax.transforms import scale_by_ggt


def sparse_ggt(
    learning_rate: optax.ScalarOrSchedule,
    window_size: int | None = None,
    density: float | None = None,
    eps: optax.ScalarOrSchedule | None = None,
    b1: chex.Numeric = 0.0,
    b2: chex.Numeric = 1.0,
    momentum: optax.ScalarOrSchedule | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    relative: bool = False,
    nesterov: bool = False,
    block_diagonal: bool = False,
    metric: Metric | Literal["auto"] | None = "auto",
    block_size: int | None = None,
    value_dtype: jax.typing.DTypeLike | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Full-matrix Adagrad on sparse gradients with error feedback.

    $$\theta \leftarrow
    \theta - \eta\, [((G^T G)^{1/2} + \epsilon I)^{-1} c_t + w \theta]$$

    The rows of $G$ are the last $m$ compressed gradients and $c_t$ is the newest:
    of each block the entries of largest magnitude, the rest being added to the next
    gradient.

    Args:
        learning_rate: Step size; a number or a schedule. The preconditioned gradient
            is at most about 1 long, so values near 1 are natural.
        window_size: Number of gradients $m$ kept, at least 1; None for 64.
        density: Share of the entries kept of every block, in (0, 1]; None for two
            of 128.
        eps: $\epsilon \ge 0$ of $((G^T G)^{1/2} + \epsilon I)^{-1}$, in the unit of a
            gradient norm; a number or a schedule. Large values approach gradient
            descent, 0 gives the pseudo-inverse. None for 1e-3 with `relative=True`.
        b1: Decay of a first moment over the window, in [0, 1) and at most `b2`.
        b2: Decay of the older rows of the window, in (0, 1]; 1 for none.
        momentum: Decay of a trace of the updates, in [0, 1); a number or a schedule.
            None or 0 for none, without a buffer.
        weight_decay: Decoupled weight decay, at least 0, multiplied by the learning
            rate; a number or a schedule.
        mask: Tree of booleans, or a function from parameters to one, that says which
            leaves decay; None for all.
        relative: Whether eps is in units of the root mean square of the norms of the
            window's rows, so that the scale of the loss does not matter.
        nesterov: Whether the first moment looks ahead.
        block_diagonal: Whether every leaf has a Gram matrix of its own, and blocks are
            cut of one leaf only, instead of one matrix for all parameters.
        metric: What gradients and updates are measured in, `diagonal_metric(...)` or
            `fixed_metric(...)`: the step is made on $D^{-1/2} g_t$, and the update
            multiplied by $D^{-1/2}$. None for the Euclidean metric. `"auto"` for
            `diagonal_metric()` where eps is None or `relative=True`, and for None
            where eps is in the published unit.
        block_size: Entries a block, at least 1; None for 128. Up to 256 every platform
            is fast; at least the number of parameters makes one block of all.
        value_dtype: Dtype of the stored values; None for bfloat16, or with density 1,
            where nothing is dropped, for the working dtype. Narrower ones are
            `jnp.int8` and `jnp.float8_e4m3fn`; see `top_k`.
        error_feedback: Whether what compression drops is added to the next gradient.
        error_dtype: Dtype of the error, floating or `jnp.int8`; None for that of the
            values' default. See `scale_by_ggt`.
        skip_nonfinite: Whether gradients with entries that are not finite are skipped.
        sharding: Where the parameters live; see `scale_by_ggt`.

    Returns:
        A gradient transformation to be passed to the training loop like any of Optax's.

    Raises:
        TypeError: An argument is of the wrong type, or a structural one is traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax, jax, jax.numpy as jnp, optax
        >>> tx = efcp_jax.sparse_ggt(0.3, window_size=16)
        >>> params = jnp.zeros(3)
        >>> def step(_, carry):
        ...     params, state = carry
        ...     updates, state = tx.update(2 * (params - 1), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> params, _ = jax.lax.fori_loop(0, 60, step, (params, tx.init(params)))
        >>> bool(jnp.all(jnp.abs(params - 1) < 0.2))
        True

    References:
        Agarwal et al., `Efficient Full-Matrix Adaptive Regularization
        <https://arxiv.org/abs/1806.02958>`_, 2019

        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        Memory: 2 bytes a parameter for the error and m density times 3 for the window
        (4 and 5 with float32, 1 and 2 with 8 bits), and the metric's. Time: a
        selection, two passes over the window, and about 10 m^3 operations.
    """
    scale = scale_by_ggt(
        window_size,
        eps,
        relative=relative,
        b1=b1,
        b2=b2,
        nesterov=nesterov,
        compressor=compressors.top_k(
            DENSITY if density is None else density,
            block_size=BLOCK_SIZE if block_size is None else block_size,
            value_dtype=stored_dtype(value_dtype, density),
        ),
        block_diagonal=block_diagonal,
        metric=metric_of(metric, eps, relative),
        error_feedback=error_feedback,
        error_dtype=stored_dtype(error_dtype, density),
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )
    return with_learning_rate(scale, learning_rate, momentum, weight_decay, mask)

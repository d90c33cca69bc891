"""M-FAC: natural gradient with the damped empirical Fisher matrix."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from efcp_jax import _validate
from efcp_jax.compressors import Compressor
from efcp_jax.metrics import Metric
from efcp_jax.numerics import not_vanished, root, saturate
from efcp_jax.preconditioners import (
    gram as grams,
    mfac_coefficients,
    system as systems,
)
from efcp_jax.states import ScaleByMfacState
from efcp_jax.step import preconditioned
from efcp_jax.window import Window


# Relative to the window, which of 0.01, 0.1 and 1 trained best or close to it for
# windows of 16 and 64 rows, with a metric and without, on three kinds of models.
_DAMPING = 0.1


def scale_by_mfac(
    window_size: int | None = None,
    damping: optax.ScalarOrSchedule | None = None,
    *,
    relative: bool = False,
    b1: chex.Numeric = 0.0,
    nesterov: bool = False,
    compressor: Compressor | None = None,
    block_diagonal: bool = False,
    metric: Metric | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    divisor: str = "window_size",
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale by the inverse of the damped empirical Fisher matrix of the last rows.

    $u = (\lambda I + G^T G / m)^{-1} \sum_i (1 - b_1) b_1^{age_i} g_i$, where the rows
    of $G$ are the last $m$ compressed gradients $g_i$. With the defaults,
    $u = (\lambda I + G^T G / m)^{-1} c_t$ with the newest, $c_t$.

    Args:
        window_size: Number of gradients $m$ kept, at least 1; None for 64.
        damping: $\lambda > 0$, in the unit of a squared gradient entry; a number or a
            schedule. None for 0.1 with `relative=True`. Large values give
            $c_t / \lambda$, a plain gradient. For values that go to 0,
            $\langle u, c_t \rangle$ goes to $m$, so the learning rate belongs near
            $1 / m$.
        relative: Whether `damping` and the update are in units of the window itself:
            with $s^2$ the mean squared norm of its rows, $\lambda$ is `damping`
            $s^2 / m$, that many times the mean of the eigenvalues of the Fisher matrix
            that are not zero (with `divisor="filled"`, $s^2$ over the rows there are),
            and the update is multiplied by $s$. Multiplying the loss by a number then
            changes nothing at all.
        b1: Decay of the first moment, in [0, 1). It needs no momentum buffer: the
            moment is taken over the window. 0 takes the newest row.
        nesterov: Whether the moment looks ahead, $b_1 \sum_i (1 - b_1) b_1^{age_i} g_i
            + (1 - b_1) c_t$.
        compressor: `identity()`, `top_k(...)` or `low_rank(...)`. None is `identity()`.
        block_diagonal: Whether every leaf has a Gram matrix of its own, a
            block-diagonal preconditioner, instead of one for all parameters. Each is
            solved by itself, and blocks of `top_k` hold entries of one leaf only.
        metric: What gradients and updates are measured in, `diagonal_metric(...)` or
            `fixed_metric(...)`: the step is made on $D^{-1/2} g_t$, and the update
            multiplied by $D^{-1/2}$. None for the Euclidean metric.
        error_feedback: Whether what the compressor drops is added to the next gradient.
            Switch it off behind `error_feedback(compressor)` in a chain.
        error_dtype: Dtype in which the error is kept; None for the working dtype
            (float32, or float64 for float64 parameters). `jnp.bfloat16` halves it and
            loses its rounding. `jnp.int8` keeps a byte an entry and a power of two a
            block, rounded at random so that in the mean nothing is lost; on CPUs one
            vector of the working dtype is a temporary then.
        divisor: `"window_size"` averages the Fisher matrix over $m$ rows from the
            first step on, as published; `"filled"` over the rows there are, which makes
            the first steps shorter by up to $m$ times.
        skip_nonfinite: Whether a gradient with an entry that is not finite is skipped:
            a zero update, an unchanged error and window, and `skipped` counted up.
        sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for
            every leaf, as a tree prefix. None takes it from the arrays' types under
            Explicit mesh axes; under Auto axes it spreads the step over the mesh in a
            way of its own, see `efcp_jax.sharding`.

    Returns:
        A gradient transformation with a `ScaleByMfacState`. Its updates point up the
        gradient and carry no learning rate.

    Raises:
        TypeError: An argument is of the wrong type, or a structural one is traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp
        >>> tx = efcp_jax.scale_by_mfac(window_size=2, damping=1.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> updates, state = tx.update(jnp.array([2., 0.]), state)
        >>> print(f"{updates[0]:.4f}")  # 2 / (1 + 2^2 / 2)
        0.6667

    References:
        Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
        Information <https://arxiv.org/abs/2107.03356>`_, 2021

        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        Memory: the window (m times the compressed gradient), the error and m^2 numbers;
        from m = 512 on 0.7 m^2 more for a factorisation that serves many steps.
        Time: one compression, two passes over the window and m^3 / 3 operations; with
        the factorisation that is kept 2 m^2 on CPUs, and m^3 / 3 once in 64 steps or
        when the damping has changed. On GPUs the host reads one boolean a step: whether
        the m x m matrix is singular to within rounding.
        With `block_diagonal` there are a Gram matrix and a system for each leaf,
        solved in one batch for windows of less than 512 rows.
        Accuracy: the relative error is the rounding unit times the condition number of
        $\lambda I + K / m$ scaled to unit diagonal; nearly dependent rows with tiny
        $\lambda$ are treated as dependent from about 1e6 on in float32.
        Derivatives: forward and reverse mode through any number of steps; what is
        selected is a constant, and of rounded values and errors they are those of the
        numbers that were rounded. What is stored as whole numbers raises: 8 bits, and
        values of 16 bits in blocks of more than 256 entries.
    """
    relative = _validate.boolean("relative", relative)
    if damping is None:
        damping, relative = _DAMPING, True
    damping = _validate.number(
        "damping",
        not_vanished(damping),
        low=0.0,
        open_low=True,
        remedy="Pass a small number such as 1e-5.",
    )
    b1 = _validate.number(
        "b1", b1, low=0.0, high=1.0, open_high=True, remedy="Pass 0.0 for no momentum."
    )
    nesterov = _validate.boolean("nesterov", nesterov)
    divisor = _validate.choice("divisor", divisor, ("window_size", "filled"))

    def coefficients(gram, kept, window: Window, slot, values):
        size = window.scale.shape[0]
        rows = window.filled.astype(gram.dtype) if divisor == "filled" else size
        rows = jnp.maximum(rows, 1)
        scale, unit = window.scale, None
        damping = not_vanished(values["damping"]).astype(gram.dtype)
        b1 = values["b1"].astype(gram.dtype)
        age = grams.ages(size, slot)
        moment = grams.moment(age, window.filled, b1, nesterov=nesterov)
        if relative:
            scale, square = grams.in_own_unit(gram, scale, window.filled)
            damping = systems.near(damping * square / rows, kept)
            unit = root(square)
        given = gram, scale, slot, damping, rows, kept, moment
        weights, kept = mfac_coefficients(*given)
        if unit is not None:
            weights = saturate(weights * unit, weights.dtype)
        return weights, kept

    return preconditioned(
        ScaleByMfacState,
        coefficients,
        systems.empty,
        {"damping": damping, "b1": b1},
        window_size=window_size,
        compressor=compressor,
        block_diagonal=block_diagonal,
        metric=metric,
        error_feedback=error_feedback,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )

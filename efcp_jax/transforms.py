"""The gradient transformations: error feedback, M-FAC and GGT."""

from typing import Any

import chex
import jax
from jax.core import Tracer
import optax

from efcp_jax import _system, _validate, gram as grams
from efcp_jax.compressors import Compressor
from efcp_jax.preconditioners import ggt_coefficients, mfac_coefficients
from efcp_jax.states import ScaleByGgtState, ScaleByMfacState
from efcp_jax.step import compressed, preconditioned
from efcp_jax.window import Window


def error_feedback(
    compressor: Compressor | None = None,
    *,
    error_dtype: jax.typing.DTypeLike | None = None,
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Compress the gradient and add what was dropped to the next one.

    $a_t = e_t + g_t$, emitted $c_t = C(a_t)$, $e_{t+1} = a_t - c_t$, $e_0 = 0$.

    Put it in front of any optimizer to train on compressed gradients.

    Args:
        compressor: `identity()`, `top_k(...)` or `low_rank(...)`. None is `identity()`.
        error_dtype: Floating dtype in which the error is kept. None keeps it in the
            working dtype (float32, or float64 for float64 parameters), in which no part
            of a gradient is lost; `jnp.bfloat16` halves it and loses its rounding.
        skip_nonfinite: Whether a gradient with an entry that is not finite leaves the
            error as it is and emits zeros. False lets such entries through.
        sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for
            every leaf, as a tree prefix. None takes it from the arrays' types under
            Explicit mesh axes, and computes on one device otherwise.

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
    """
    return compressed(
        compressor=compressor,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )


def scale_by_mfac(
    window_size: int | None = None,
    damping: optax.ScalarOrSchedule = 1e-2,
    *,
    compressor: Compressor | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    divisor: str = "window_size",
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale by the inverse of the damped empirical Fisher matrix of the last rows.

    $u = (\lambda I + G^T G / m)^{-1} c_t$, where the rows of $G$ are the last $m$
    compressed gradients and $c_t$ is the newest.

    Args:
        window_size: Number of gradients $m$ kept, at least 1; None for 64.
        damping: $\lambda > 0$, in the unit of a squared gradient entry; a number or a
            schedule. Large values give $c_t / \lambda$, a plain gradient. For values
            that go to 0, $\langle u, c_t \rangle$ goes to $m$, so the learning rate
            belongs near $1 / m$.
        compressor: `identity()`, `top_k(...)` or `low_rank(...)`. None is `identity()`.
        error_feedback: Whether what the compressor drops is added to the next gradient.
            Switch it off behind `error_feedback(compressor)` in a chain.
        error_dtype: Floating dtype in which the error is kept; None for the working
            dtype (float32, or float64 for float64 parameters).
        divisor: `"window_size"` averages the Fisher matrix over $m$ rows from the
            first step on, as published; `"filled"` over the rows there are, which makes
            the first steps shorter by up to $m$ times.
        skip_nonfinite: Whether a gradient with an entry that is not finite is skipped:
            a zero update, an unchanged error and window, and `skipped` counted up.
        sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for
            every leaf, as a tree prefix. None takes it from the arrays' types under
            Explicit mesh axes, and computes on one device otherwise.

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
        Accuracy: the relative error is the rounding unit times the condition number of
        $\lambda I + K / m$ scaled to unit diagonal; nearly dependent rows with tiny
        $\lambda$ are treated as dependent from about 1e6 on in float32.
    """
    damping = _validate.number(
        "damping",
        damping,
        low=0.0,
        open_low=True,
        remedy="Pass a small number such as 1e-5.",
    )
    divisor = _validate.choice("divisor", divisor, ("window_size", "filled"))

    def coefficients(gram, kept, window: Window, slot, values):
        size = window.scale.shape[0]
        rows = window.filled.astype(gram.dtype) if divisor == "filled" else size
        damping = values["damping"]
        return mfac_coefficients(gram, window.scale, slot, damping, rows, kept)

    return preconditioned(
        ScaleByMfacState,
        coefficients,
        _system.empty,
        {"damping": damping},
        window_size=window_size,
        compressor=compressor,
        error_feedback=error_feedback,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )


def scale_by_ggt(
    window_size: int | None = None,
    eps: optax.ScalarOrSchedule = 1e-4,
    *,
    b1: chex.Numeric = 0.0,
    b2: chex.Numeric = 1.0,
    compressor: Compressor | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale by the inverse root of the second moment of the last rows.

    $u = ((\tilde G^T \tilde G)^{1/2} + \epsilon I)^{-1} \sum_i (1 - b_1) b_1^{age_i}
    g_i$, full-matrix Adagrad, where the rows of $\tilde G$ are the last $m$ compressed
    gradients $g_i$ times $b_2^{age_i}$. With the defaults, $u = ((G^T G)^{1/2} +
    \epsilon I)^{-1} c_t$.

    Args:
        window_size: Number of gradients $m$ kept, at least 1; None for 64.
        eps: $\epsilon \ge 0$, added to every singular value of the window, in the unit
            of a gradient norm; a number or a schedule. Large values give
            $c_t / \epsilon$, a plain gradient; 0 gives the pseudo-inverse. For values
            that go to 0 the update is at most 1 long, so the learning rate belongs
            near 1.
        b1: Decay of the first moment, in [0, 1), at most `b2`. It needs no momentum
            buffer: the moment is taken over the window. 0 takes the newest row.
        b2: Decay of the older rows of the window, in (0, 1]. 1 keeps them as they are.
        compressor: `identity()`, `top_k(...)` or `low_rank(...)`. None is `identity()`.
        error_feedback: Whether what the compressor drops is added to the next gradient.
            Switch it off behind `error_feedback(compressor)` in a chain.
        error_dtype: Floating dtype in which the error is kept; None for the working
            dtype (float32, or float64 for float64 parameters).
        skip_nonfinite: Whether a gradient with an entry that is not finite is skipped:
            a zero update, an unchanged error and window, and `skipped` counted up.
        sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for
            every leaf, as a tree prefix. None takes it from the arrays' types under
            Explicit mesh axes, and computes on one device otherwise.

    Returns:
        A gradient transformation with a `ScaleByGgtState`. Its updates point up the
        gradient and carry no learning rate.

    Raises:
        TypeError: An argument is of the wrong type, or a structural one is traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp
        >>> tx = efcp_jax.scale_by_ggt(window_size=2, eps=1.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> updates, state = tx.update(jnp.array([3., 0.]), state)
        >>> print(f"{updates[0]:.4f}")  # 3 / (3 + 1)
        0.7500

    References:
        Agarwal et al., `Efficient Full-Matrix Adaptive Regularization
        <https://arxiv.org/abs/1806.02958>`_, 2019

        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        Memory: the window (m times the compressed gradient), the error and m^2 numbers.
        Time: one compression, two passes over the window and an eigendecomposition of
        an `(m, m)` matrix, about 10 m^3 operations.
        Accuracy: singular values below 3e-4 of the largest are not resolved in float32.
    """
    eps = _validate.number(
        "eps", eps, low=0.0, remedy="Pass a small number such as 1e-4."
    )
    b1 = _validate.number(
        "b1", b1, low=0.0, high=1.0, open_high=True, remedy="Pass 0.0 for no momentum."
    )
    b2 = _validate.number(
        "b2", b2, low=0.0, high=1.0, open_low=True, remedy="Pass 1.0 for no decay."
    )
    concrete = not any(isinstance(each, Tracer) for each in (b1, b2))
    if concrete and not callable(b1) and not callable(b2) and b1 > b2:
        raise ValueError(
            f"`b1` must be at most `b2`, got b1={b1} and b2={b2}: the first moment"
            " would reach further back than the rows it is taken over. Lower `b1` or"
            " raise `b2`."
        )

    def coefficients(gram, kept, window: Window, slot, values):
        age = grams.ages(window.scale.shape[0], slot)
        weights = ggt_coefficients(
            gram,
            window.scale,
            age,
            window.filled,
            values["eps"],
            values["b1"],
            values["b2"],
        )
        return weights, kept

    return preconditioned(
        ScaleByGgtState,
        coefficients,
        lambda size, dtype: None,
        {"eps": eps, "b1": b1, "b2": b2},
        window_size=window_size,
        compressor=compressor,
        error_feedback=error_feedback,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )

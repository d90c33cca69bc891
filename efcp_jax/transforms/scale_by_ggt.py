"""GGT: full-matrix Adagrad over a window."""

from typing import Any

import chex
import jax
from jax.core import Tracer
import optax

from efcp_jax import _validate
from efcp_jax.compressors import Compressor
from efcp_jax.metrics import Metric
from efcp_jax.numerics import not_vanished, root
from efcp_jax.preconditioners import ggt_coefficients, gram as grams
from efcp_jax.states import ScaleByGgtState
from efcp_jax.step import preconditioned
from efcp_jax.window import Window


# Relative to the window: above what float32 resolves of its singular values, and from
# 1e-6 to 1e-2 training was the same to within a hundredth.
_EPS = 1e-3


def scale_by_ggt(
    window_size: int | None = None,
    eps: optax.ScalarOrSchedule | None = None,
    *,
    relative: bool = False,
    b1: chex.Numeric = 0.0,
    b2: chex.Numeric = 1.0,
    nesterov: bool = False,
    compressor: Compressor | None = None,
    block_diagonal: bool = False,
    metric: Metric | None = None,
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
            of a gradient norm; a number or a schedule. None for 1e-3 with
            `relative=True`. Large values give $c_t / \epsilon$, a plain gradient; 0
            gives the pseudo-inverse. For values that go to 0 the update is at most 1
            long, so the learning rate belongs near 1.
        relative: Whether `eps` is in units of the window itself: of the root mean
            square of the norms of its rows. Multiplying the loss by a number then
            changes nothing.
        b1: Decay of the first moment, in [0, 1), at most `b2`. It needs no momentum
            buffer: the moment is taken over the window. 0 takes the newest row.
        b2: Decay of the older rows of the window, in (0, 1]. 1 keeps them as they are.
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
        skip_nonfinite: Whether a gradient with an entry that is not finite is skipped:
            a zero update, an unchanged error and window, and `skipped` counted up.
        sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for
            every leaf, as a tree prefix. None takes it from the arrays' types under
            Explicit mesh axes; under Auto axes it spreads the step over the mesh in a
            way of its own, see `efcp_jax.sharding`.

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
        With `block_diagonal` there are a Gram matrix and a system for each leaf,
        solved in one batch.
        Accuracy: singular values below 3e-4 of the largest are not resolved in float32.
        Derivatives: as of `scale_by_mfac`, also where singular values are equal.
    """
    relative = _validate.boolean("relative", relative)
    if eps is None:
        eps, relative = _EPS, True
    eps = _validate.number(
        "eps", not_vanished(eps), low=0.0, remedy="Pass a small number such as 1e-4."
    )
    b1 = _validate.number(
        "b1", b1, low=0.0, high=1.0, open_high=True, remedy="Pass 0.0 for no momentum."
    )
    b2 = _validate.number(
        "b2", b2, low=0.0, high=1.0, open_low=True, remedy="Pass 1.0 for no decay."
    )
    nesterov = _validate.boolean("nesterov", nesterov)
    concrete = not any(isinstance(each, Tracer) for each in (b1, b2))
    if concrete and not callable(b1) and not callable(b2) and b1 > b2:
        raise ValueError(
            f"`b1` must be at most `b2`, got b1={b1} and b2={b2}: the first moment"
            " would reach further back than the rows it is taken over. Lower `b1` or"
            " raise `b2`."
        )

    def coefficients(gram, kept, window: Window, slot, values):
        age = grams.ages(window.scale.shape[0], slot)
        scale, eps = window.scale, not_vanished(values["eps"])
        if relative:
            # An update of GGT is the same in every unit of the rows.
            scale, square = grams.in_own_unit(gram, scale, window.filled)
            eps = eps * root(square)
        weights = ggt_coefficients(
            gram,
            scale,
            age,
            window.filled,
            eps,
            values["b1"],
            values["b2"],
            nesterov,
        )
        return weights, kept

    return preconditioned(
        ScaleByGgtState,
        coefficients,
        lambda size, dtype: None,
        {"eps": eps, "b1": b1, "b2": b2},
        window_size=window_size,
        compressor=compressor,
        block_diagonal=block_diagonal,
        metric=metric,
        error_feedback=error_feedback,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )

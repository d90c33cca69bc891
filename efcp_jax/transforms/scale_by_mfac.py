"""M-FAC: natural gradient with the damped empirical Fisher matrix."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from efcp_jax import _validate
from efcp_jax._docstrings import MFAC, documented
from efcp_jax.compressors import Compressor
from efcp_jax.feedback import Window
from efcp_jax.metrics import DiagonalMetric, MetricState
from efcp_jax.numerics import not_vanished, root, saturate
from efcp_jax.preconditioners import gram as grams, mfac_coefficients, system as systems
from efcp_jax.step import checked, preconditioned


# Relative to the window, which of 0.01, 0.1 and 1 trained best or close to it for
# windows of 16 and 64 rows, with a metric and without, on three kinds of models.
_DAMPING = 0.1


class ScaleByMfacState(NamedTuple):
    """State of `scale_by_mfac`.

    Attributes:
        count: Number of updates, int32.
        skipped: Number of updates skipped for entries that were not finite, int32.
        error: What compression has dropped so far, in working form; None without error
            feedback.
        basis: What the compressor carries between steps, or None.
        window: The last m compressed gradients.
        gram: Inner products of the window's stored rows, shape `(m, m)`; where the
            compressor is block diagonal, `(g, m, m)` for each group of g leaves.
        factor: What is kept of the factorisation of each m x m system for the steps to
            come, or None.
        metric: The moments of the metric, or None.
    """

    count: jax.Array
    skipped: jax.Array
    error: chex.ArrayTree | None
    basis: chex.ArrayTree | None
    window: Window
    gram: chex.ArrayTree
    factor: chex.ArrayTree | None
    metric: MetricState | None = None


@documented(MFAC)
def scale_by_mfac(
    window_size: int | None = None,
    damping: optax.ScalarOrSchedule | None = None,
    *,
    relative: bool = False,
    b1: chex.Numeric = 0.0,
    nesterov: bool = False,
    compressor: Compressor | None = None,
    block_diagonal: bool = False,
    metric: DiagonalMetric | None = None,
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

    %(arguments)s

    Returns:
        A gradient transformation with a `ScaleByMfacState`. Its updates point up the
        gradient and carry no learning rate.

    %(raises)s

    Examples:
        >>> import efcp_jax, jax.numpy as jnp
        >>> tx = efcp_jax.scale_by_mfac(window_size=2, damping=1.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> updates, state = tx.update(jnp.array([2., 0.]), state)
        >>> print(f"{updates[0]:.4f}")  # 2 / (1 + 2^2 / 2)
        0.6667

    %(mfac_papers)s

    Notes:
        Memory: the window (m times the compressed gradient), the error and m^2 numbers;
        from m = 512 on 0.7 m^2 more for a factorisation that serves many steps.
        Time: one compression, two passes over the window and m^3 / 3 operations; with
        the factorisation that is kept 2 m^2 on CPUs, and m^3 / 3 once in 64 steps or
        when the damping has changed. GPUs tell the host whether the matrix is singular.
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
    damping = _validate.number("damping", not_vanished(damping))
    b1 = _validate.number("b1", b1)
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

    feedback = checked(
        compressor, metric, error_dtype, skip_nonfinite, error_feedback, block_diagonal
    )
    values = {"damping": damping, "b1": b1}
    made = ScaleByMfacState, coefficients, systems.empty, values
    return preconditioned(*made, window_size, feedback, sharding)

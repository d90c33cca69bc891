"""GGT: full-matrix Adagrad over a window."""

from typing import Any, NamedTuple

import chex
import jax
from jax.core import Tracer
import optax

from efcp_jax import _validate
from efcp_jax._docstrings import GGT, documented
from efcp_jax.compressors import Compressor
from efcp_jax.feedback import Window
from efcp_jax.metrics import DiagonalMetric, MetricState
from efcp_jax.numerics import not_vanished, root
from efcp_jax.preconditioners import ggt_coefficients, gram as grams
from efcp_jax.step import checked, preconditioned


# Relative to the window: above what float32 resolves of its singular values, and from
# 1e-6 to 1e-2 training was the same to within a hundredth.
_EPS = 1e-3


class ScaleByGgtState(NamedTuple):
    """State of `scale_by_ggt`; the fields are those of `ScaleByMfacState`."""

    count: jax.Array
    skipped: jax.Array
    error: chex.ArrayTree | None
    basis: chex.ArrayTree | None
    window: Window
    gram: chex.ArrayTree
    factor: chex.ArrayTree | None
    metric: MetricState | None = None


@documented(GGT)
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
    metric: DiagonalMetric | None = None,
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

    %(arguments)s

    Returns:
        A gradient transformation with a `ScaleByGgtState`. Its updates point up the
        gradient and carry no learning rate.

    %(raises)s

    Examples:
        >>> import efcp_jax, jax.numpy as jnp
        >>> tx = efcp_jax.scale_by_ggt(window_size=2, eps=1.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> updates, state = tx.update(jnp.array([3., 0.]), state)
        >>> print(f"{updates[0]:.4f}")  # 3 / (3 + 1)
        0.7500

    %(ggt_papers)s

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
    eps = _validate.number("eps", not_vanished(eps))
    b1, b2 = _validate.number("b1", b1), _validate.number("b2", b2)
    nesterov = _validate.boolean("nesterov", nesterov)
    unknown = any(callable(each) or isinstance(each, Tracer) for each in (b1, b2))
    if not unknown and b1 > b2:
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
        given = gram, scale, age, window.filled, eps, values["b1"], values["b2"]
        return ggt_coefficients(*given, nesterov), kept

    feedback = checked(
        compressor, metric, error_dtype, skip_nonfinite, error_feedback, block_diagonal
    )
    values = {"eps": eps, "b1": b1, "b2": b2}
    made = ScaleByGgtState, coefficients, lambda size, dtype: None, values
    return preconditioned(*made, window_size, feedback, sharding)

r"""Coefficients of the update from the Gram matrix: m x m work, whatever d is.

The compressed gradient $c_t$ is row $j$ of the window, $c_t = G^T e_j$, so with
$K = G G^T$ (push-through identity)

$$(\lambda I + G^T G / m)^{-1} c_t = G^T (\lambda I + K / m)^{-1} e_j, \qquad
((G^T G)^{1/2} + \epsilon I)^{-1} c_t = G^T (K^{1/2} + \epsilon I)^{-1} e_j.$$

No large numbers are subtracted, unlike in the form $x / \lambda - G^T(\ldots)$.

Rows come scaled: $G = S \hat G$ with $S = \mathrm{diag}(s)$, so both functions take
$\hat K = \hat G \hat G^T$ and $s$, return $S w$, and never form a square of $s$: rows
from 1e-30 to 1e30 share a window.

Degenerate windows have stated results, finite ones. Zero rows, empty slots included,
have no part in the update, and for a zero newest row it is zero. Where rows depend on
each other to within rounding, the update is the limit of the exact one, which for a
damping or eps of 0 is the pseudo-inverse; schedules below 0 count as 0. One gradient
$c$ in $t$ of $m$ slots gives $c / (\lambda + |c|^2 t / m)$ and
$c / (|c| \sqrt{t} + \epsilon)$. Numbers that the hardware flushes are zeros, and what
would overflow is clipped.
"""

import chex
import jax
import jax.numpy as jnp

from efcp_jax import _system
from efcp_jax._dot import dot


# The largest stored entry is below 2^2, so a sum of m rows with coefficients below the
# largest number over 2^3 m is finite.
_HEADROOM = 8.0


def mfac_coefficients(
    gram: jax.Array,
    scale: jax.Array,
    slot: jax.Array,
    damping: chex.Numeric,
    divisor: chex.Numeric,
    kept: _system.Kept | None = None,
) -> tuple[jax.Array, _system.Kept | None]:
    r"""Return $S (\lambda I + S \hat K S / n)^{-1} e_j$.

    The matrix is scaled to unit diagonal, so rows may differ in norm by any factor, and
    factorised by Cholesky. Where a row depends on the others to within rounding, the
    factor is replaced by an eigendecomposition without the directions that rounding
    made up; what is dropped cannot be told from zero in this precision.

    Args:
        gram: $\hat K$, shape `(m, m)`.
        scale: $s$, shape `(m,)`; 0 for empty slots.
        slot: $j$, the slot of the newest row, int32.
        damping: $\lambda \ge 0$, in the unit of a squared gradient entry.
        divisor: $n$, the number of rows the Fisher matrix is averaged over.
        kept: What the step before has left of its factorisation, `_system.empty` in
            front of the first, or None. Between two steps no row may change but that at
            $j$.

    Returns:
        Coefficients of the stored rows, shape `(m,)`, in the dtype of `gram`, and what
        is left for the next step. The relative error of the coefficients, and that of
        the update against the lengths of the rows that are combined, grows as the
        condition number of the scaled matrix times the rounding unit.

    References:
        Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
        Information <https://arxiv.org/abs/2107.03356>`_, 2021

    Notes:
        m^3 / 3 operations; where the remedy is needed, about 30 m^3 more. With `kept`,
        on CPUs, 2 m^2 operations, and m^3 / 3 once in 64 steps or when the damping or
        the divisor changes.
    """
    dtype, size = gram.dtype, gram.shape[0]
    # A schedule may undershoot 0 by a rounding error; a window may still be empty.
    damping = jnp.maximum(jnp.asarray(damping, dtype), 0)
    divisor = jnp.maximum(jnp.asarray(divisor, dtype), 1)
    norms = scale * jnp.sqrt(jnp.diagonal(gram) / divisor)
    # Unit-diagonal scaling: diagonal[i]^2 = lambda + |row i|^2 / n.
    diagonal = jnp.hypot(norms, jnp.sqrt(damping))
    inverse = 1 / jnp.where(diagonal > 0, diagonal, 1)
    weights = scale * inverse
    system = _system.System(gram.reshape(-1), weights, divisor)
    solution, kept = _system.solve(system, inverse, slot, damping, kept)
    # Without damping and for norms near the smallest number the solution overflows.
    limit = jnp.finfo(dtype).max / (_HEADROOM * size)
    inverse = jnp.minimum(inverse, limit)
    return jnp.clip(weights * solution * inverse[slot], -limit, limit), kept


def ggt_coefficients(
    gram: jax.Array,
    scale: jax.Array,
    age: jax.Array,
    filled: jax.Array,
    eps: chex.Numeric,
    b1: chex.Numeric,
    b2: chex.Numeric,
) -> jax.Array:
    r"""Return $S D ((D S \hat K S D)^{1/2} + \epsilon I)^{-1} D^{-1} b$.

    $D = \mathrm{diag}(b_2^{age})$ lets old rows fade and
    $b = (1 - b_1)\, b_1^{age}$ is the first moment of the stored gradients, so that the
    update is $((\tilde G^T \tilde G)^{1/2} + \epsilon I)^{-1} G^T b$ with
    $\tilde G = D G$, exactly.

    Args:
        gram: $\hat K$, shape `(m, m)`.
        scale: $s$, shape `(m,)`; 0 for empty slots.
        age: Age of every slot, 0 for the newest, shape `(m,)`.
        filled: Number of slots that hold a row, at least 1.
        eps: $\epsilon \ge 0$, in the unit of a gradient norm. Singular values below the
            root of the rounding unit (3e-4 in float32) times the largest are taken to
            be that large, which is what the Gram matrix resolves.
        b1: Decay of the first moment, in [0, 1), at most `b2`.
        b2: Decay of the rows, in (0, 1].

    Returns:
        Coefficients of the stored rows, shape `(m,)`, in the dtype of `gram`.

    References:
        Agarwal et al., `Efficient Full-Matrix Adaptive Regularization
        <https://arxiv.org/abs/1806.02958>`_, 2019

    Notes:
        One symmetric eigendecomposition, about 10 m^3 operations.
    """
    dtype = gram.dtype
    b1, b2, eps = (jnp.asarray(value, dtype) for value in (b1, b2, eps))
    eps = jnp.maximum(eps, 0)  # a schedule may undershoot by a rounding error
    weights = scale * b2**age
    norms = weights * jnp.sqrt(jnp.diagonal(gram))
    largest = jnp.max(norms)
    inverse = 1 / jnp.where(largest > 0, largest, 1)
    weights = weights * inverse
    values, vectors = jnp.linalg.eigh(weights[:, None] * gram * weights)
    floor = jnp.finfo(dtype).eps * jnp.maximum(values[-1], 1)
    singular = jnp.sqrt(jnp.maximum(values, floor))
    # D^-1 b as one power, which neither under- nor overflows for b1 <= b2.
    moment = jnp.where(age < filled, (1 - b1) * (b1 / b2) ** age, 0)
    rotated = dot(vectors.T, moment) / (singular + eps * inverse)
    return weights * dot(vectors, rotated)

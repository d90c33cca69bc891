"""The coefficients of M-FAC: one column of the inverse of an m x m matrix."""

from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.numerics import at_least_zero, dot
from efcp_jax.preconditioners import implicit, system as systems


# The largest stored entry is below 2^2, so a sum of m rows with coefficients below the
# largest number over 2^3 m is finite.
_HEADROOM = 8.0


def mfac_coefficients(
    gram: jax.Array,
    scale: jax.Array,
    slot: jax.Array,
    damping: chex.Numeric,
    divisor: chex.Numeric,
    kept: systems.Kept | None = None,
    moment: jax.Array | None = None,
) -> tuple[jax.Array, systems.Kept | None]:
    r"""Return $S (\lambda I + S \hat K S / n)^{-1} b$.

    The matrix is scaled to unit diagonal, so rows may differ in norm by any factor, and
    factorised by Cholesky. Where a row depends on the others to within rounding, one
    with pivots follows, which leaves out such rows; what is dropped cannot be told from
    zero in this precision.

    Args:
        gram: $\hat K$, shape `(m, m)`.
        scale: $s$, shape `(m,)`; 0 for empty slots.
        slot: $j$, the slot of the newest row, int32.
        damping: $\lambda \ge 0$, in the unit of a squared gradient entry.
        divisor: $n$, the number of rows the Fisher matrix is averaged over.
        kept: What the step before has left of its factorisation, `systems.empty` in
            front of the first, or None. Between two steps no row may change but that at
            $j$.
        moment: $b$, what of each row is preconditioned, shape `(m,)`. None for $e_j$,
            the newest gradient.

    Returns:
        Coefficients of the stored rows, shape `(m,)`, in the dtype of `gram`, and what
        is left for the next step. The relative error of the coefficients, and that of
        the update against the lengths of the rows that are combined, grows as the
        condition number of the scaled matrix times the rounding unit.

    References:
        Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
        Information <https://arxiv.org/abs/2107.03356>`_, 2021

    Notes:
        m^3 / 3 operations; where the remedy is needed, about 6 m^3 more. With `kept`,
        on CPUs, 2 m^2 operations, and m^3 / 3 once in 64 steps or when the damping or
        the divisor changes.
    """
    dtype, size = gram.dtype, gram.shape[0]
    # A schedule may undershoot 0 by a rounding error; a window may still be empty.
    damping = at_least_zero(jnp.asarray(damping, dtype))
    divisor = jnp.maximum(jnp.asarray(divisor, dtype), 1)
    if moment is None:
        moment = jnp.eye(size, dtype=dtype)[slot]
    return _solved(gram, scale, damping, divisor, moment, slot, kept)


@jax.custom_jvp
def _solved(
    gram: jax.Array,
    scale: jax.Array,
    damping: jax.Array,
    divisor: jax.Array,
    moment: jax.Array,
    slot: jax.Array,
    kept: systems.Kept | None,
) -> tuple[jax.Array, systems.Kept | None]:
    """Return what `mfac_coefficients` does."""
    system, inverse = _system(gram, scale, damping, divisor)
    # The largest entry of the right-hand side becomes one.
    unit = jnp.max(inverse * jnp.abs(moment))
    unit = jnp.where(unit > 0, unit, 1)
    given = inverse, moment, unit, slot, damping, kept
    solution, kept = systems.solve(system, *given)
    # Without damping and for norms near the smallest number the solution overflows.
    limit = jnp.finfo(gram.dtype).max / (_HEADROOM * len(scale))
    unit = jnp.minimum(unit, limit)
    return jnp.clip(system.weights * solution * unit, -limit, limit), kept


@_solved.defjvp
def _solved_jvp(primals: Any, tangents: Any) -> Any:
    r"""Return $w = S z$ of $A z = b$, and $w' = S A^{-1} (b' - A' z)$.

    No factorisation is differentiated. With dependent rows and no damping to speak of,
    $z$ solves $A (b - A z) = 0$, and $z' = A^+ (b' - A' z + A^+ A' (b - A z))$, the
    derivative among windows of one rank. Scales are powers of two: constants.
    """
    gram, scale, damping, divisor, moment, *others = primals
    d_gram, _, d_damping, _, d_moment, _, _ = tangents
    # Without damping there is no derivative at a row of zeros.
    scale = jnp.where((jnp.diagonal(gram) > 0) | (damping > 0), scale, 0)
    weights, new = _solved(gram, scale, damping, divisor, moment, *others)
    solution = weights / jnp.where(scale > 0, scale, 1)
    products = lambda gram, weights: scale * dot(gram, weights) / divisor

    def multiply(x: jax.Array) -> jax.Array:
        x = inverse * x
        return inverse * (damping * x + products(gram, scale * x))

    system, inverse = lax.stop_gradient(_system(gram, scale, damping, divisor))
    solve, sound = implicit.inverse(system, inverse, multiply)
    change = lambda z, weights: d_damping * z + products(d_gram, weights)
    left = moment - damping * solution - products(gram, weights)
    left = jnp.where(sound, 0, left)
    more = inverse * solve(inverse * change(left, scale * left))
    rest = d_moment - change(solution, weights) + more
    d_weights = system.weights * solve(inverse * rest)
    return (weights, new), (d_weights, implicit.kept(new, damping, d_damping))


def _system(
    gram: jax.Array, scale: jax.Array, damping: jax.Array, divisor: jax.Array
) -> tuple[systems.System, jax.Array]:
    r"""Return $D (\lambda I + S \hat K S / n) D$ of unit diagonal, and that of $D$."""
    norms = scale * jnp.sqrt(jnp.diagonal(gram) / divisor)
    # Unit-diagonal scaling: diagonal[i]^2 = lambda + |row i|^2 / n.
    diagonal = jnp.hypot(norms, jnp.sqrt(damping))
    inverse = 1 / jnp.where(diagonal > 0, diagonal, 1)
    return systems.System(gram.reshape(-1), scale * inverse, divisor), inverse

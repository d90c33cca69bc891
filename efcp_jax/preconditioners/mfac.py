"""The coefficients of M-FAC: one column of the inverse of an m x m matrix."""

from typing import Any, NamedTuple

import chex
import jax
from jax import lax
from jax.dtypes import float0
import jax.numpy as jnp
import numpy as np

from efcp_jax.numerics import at_least_zero, dot
from efcp_jax.preconditioners import cholesky, system as systems


# The largest stored entry is below 2^2, so a sum of m rows with coefficients below the
# largest number over 2^3 m is finite.
_HEADROOM = 8.0
# Eigenvalues below so many rounding errors a row are rounding errors.
_NOISE = 2.0


def mfac_coefficients(
    gram: jax.Array,
    scale: jax.Array,
    slot: jax.Array,
    damping: chex.Numeric,
    divisor: chex.Numeric,
    kept: systems.Kept | None = None,
    moment: jax.Array | None = None,
) -> tuple[jax.Array, systems.Kept | None]:
    r"""Return $S (\lambda I + S \hat K S / n)^{-1} b$, and what the next step is given.

    $b$ is the `moment`, by default $e_j$, and $n$ the `divisor`. `kept` is what the
    step before has left; between two steps no row may change but that at `slot`.

    The matrix is scaled to unit diagonal, so rows may differ in norm by any factor, and
    factorised by Cholesky. Where a row depends on the others to within rounding, one
    with pivots follows, which leaves out what cannot be told from zero. The relative
    error, of the update against the rows that are combined, grows as the condition
    number of the scaled matrix times the rounding unit.

    m^3 / 3 operations; where the remedy is needed, about 6 m^3 more. With `kept`, on
    CPUs, 2 m^2, and m^3 / 3 once in 64 steps or when damping or divisor change.
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
    system, inverse = _system(gram, scale, damping, divisor)
    # The largest entry of the right-hand side becomes one.
    unit = jnp.max(inverse * jnp.abs(moment))
    unit = jnp.where(unit > 0, unit, 1)
    solution, kept = systems.solve(system, inverse, moment, unit, slot, damping, kept)
    # Without damping and for norms near the smallest number the solution overflows.
    limit = jnp.finfo(gram.dtype).max / (_HEADROOM * len(scale))
    unit = jnp.minimum(unit, limit)
    return jnp.clip(system.weights * solution * unit, -limit, limit), kept


@_solved.defjvp
def _solved_jvp(primals: Any, tangents: Any) -> Any:
    r"""Return $w = S z$ of $A z = b$, and $w' = S A^{-1} (b' - A' z)$.

    No factorisation is differentiated, nor does it matter when that which is kept was
    made. With dependent rows and no damping to speak of, $z$ solves $A (b - A z) = 0$,
    and $z' = A^+ (b' - A' z + A^+ A' (b - A z))$, the derivative among windows of one
    rank. Scales are powers of two: constants.
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
    matrix = system.rows(0, system.size)
    factor: Any = cholesky.factorise(matrix.T, system.size)
    sound = cholesky.is_sound(factor)
    # Both branches are taken where there is a batch: a NaN times 0 is no 0.
    factor = jnp.where(sound, factor, jnp.eye(len(scale), dtype=gram.dtype))
    one = jnp.ones((), gram.dtype)
    by_factor = lambda rhs: cholesky.solve(factor, rhs)
    by_basis = lambda b: systems.in_basis(system, inverse, b / inverse, one)
    divide = lambda _, rhs: lax.cond(sound, by_factor, by_basis, rhs)
    # Reverse mode transposes this, as it could not the loops of the solver.
    transposed = lambda _, x: jax.linear_transpose(lambda y: divide(None, y), x)(x)[0]
    solve = lambda rhs: lax.custom_linear_solve(multiply, rhs, divide, transposed)
    change = lambda z, weights: d_damping * z + products(d_gram, weights)
    left = jnp.where(sound, 0, moment - damping * solution - products(gram, weights))
    more = inverse * solve(inverse * change(left, scale * left))
    rest = d_moment - change(solution, weights) + more
    d_weights, d_new = system.weights * solve(inverse * rest), None
    if new is not None:
        d_kept = jnp.where(new.damping == damping, d_damping, 0)
        d_new = jax.tree.map(jnp.zeros_like, new)
        d_new = d_new._replace(run=np.zeros((), float0), damping=d_kept)
    return (weights, new), (d_weights, d_new)


def _system(
    gram: jax.Array, scale: jax.Array, damping: jax.Array, divisor: jax.Array
) -> tuple[systems.System, jax.Array]:
    r"""Return $D (\lambda I + S \hat K S / n) D$ of unit diagonal, and that of $D$."""
    norms = scale * jnp.sqrt(jnp.diagonal(gram) / divisor)
    # Unit-diagonal scaling: diagonal[i]^2 = lambda + |row i|^2 / n.
    diagonal = jnp.hypot(norms, jnp.sqrt(damping))
    inverse = 1 / jnp.where(diagonal > 0, diagonal, 1)
    return systems.System(gram.reshape(-1), scale * inverse, divisor), inverse


class Ridge(NamedTuple):
    r"""$D (S \hat K S + \rho I) D$ of unit diagonal, for any right-hand side."""

    weights: jax.Array  # the diagonal of $S D$
    shift: jax.Array  # that of $\rho D^2$, in (0, 1]
    values: jax.Array  # eigenvalues, at least what rounding makes up
    vectors: jax.Array

    def better(self, products: jax.Array, solution: jax.Array) -> jax.Array:
        r"""Return $v$ with the solution of what is left, $D (S \hat b - \rho D v)$."""
        left = self.weights * products - self.shift * solution
        return solution + dot(self.vectors, dot(left, self.vectors) / self.values)


def ridge(gram: jax.Array, scale: jax.Array, shift: jax.Array) -> Ridge:
    """Return the system, by an eigendecomposition."""
    system, inverse = _system(gram, scale, shift, jnp.ones_like(shift))
    values, vectors = jnp.linalg.eigh(system.rows(0, system.size))
    values = jnp.maximum(values, _NOISE * system.size * jnp.finfo(gram.dtype).eps)
    # In two steps, since a squared norm may overflow.
    share = (jnp.sqrt(shift) * inverse) ** 2
    return Ridge(system.weights, share, values, vectors)

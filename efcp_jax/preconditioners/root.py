r"""A function of the root of a matrix by matrix products, without eigenvectors.

With $A = L L^T$ and the polar decomposition $L = S Q$, $Q^T Q = I$,

$$A^{1/2} = S, \qquad
\max(S, \phi I) = \tfrac12 \left(S + \phi I + Y \operatorname{sign} Y\right),
\quad Y = S - \phi I,$$

where $\operatorname{sign} Y$ is the polar factor of $Y$. Polar factors come from

$$X \leftarrow \tfrac{\rho}{2} X (3 I - \rho^2 X^T X),$$

which drives all singular values to one. As the condition of $L$ is the root of that of
$A$, no digits are lost that $A$ has. Its eigenvalues are never looked at one by one.
"""

import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.numerics import dot, dot_by_rows
from efcp_jax.preconditioners import cholesky, pivoted


# With 1.4, singular values in (0.7, 1) stay there and small ones grow by 2.1 a round.
# With sqrt(3) small ones would grow by 2.6 and large ones fall to nothing.
_GROWTH = 1.4

# Rounds without it, from 0.7 to 1 to the last digit of a double.
_LAST = 6

# Singular values are resolved down to this part of the floor.
_RESOLVED = 1e-2

# Largest over second largest eigenvalue to the power 2^12: the largest is found to
# ln(m) / 2^12, 2e-3 at worst, by squaring as often.
_SQUARINGS = 12


# Up to this size, eigenvectors are one kernel on TPUs. Above, they take minutes to
# compile: 2 at 512 rows.
_EIGENVECTORS = 256


@jax.custom_jvp
def solve(matrix: jax.Array, eps: jax.Array, rhs: jax.Array) -> jax.Array:
    """Return what `by_products` does, on all but TPUs by an eigendecomposition."""
    if len(matrix) <= _EIGENVECTORS:
        return by_eigenvectors(matrix, eps, rhs)
    return lax.platform_dependent(
        matrix, eps, rhs, tpu=by_products, default=by_eigenvectors
    )


@solve.defjvp
def _solve_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    r"""Return the solution $x$ of $(S + \epsilon I) x = b$ and its derivative.

    $(S + \epsilon I) x' = b' - S' x - \epsilon' x$. Eigenvectors are constants here:
    they have no derivative where eigenvalues are equal.
    """
    matrix, eps, _ = primals
    d_matrix, d_eps, d_rhs = tangents
    solution = solve(*primals)
    root, d_root = jax.jvp(singular, (matrix,), (d_matrix,))
    values, vectors, known = _decomposed(lax.stop_gradient(matrix))
    shifted = values + lax.stop_gradient(eps)
    divide = lambda _, x: dot(vectors, dot(vectors.T, x) / shifted)
    # What rounding makes up of dependent rows would be divided by the square of both.
    resolved = known | (eps > values)
    part = dot(vectors, jnp.where(resolved, dot(vectors.T, solution), 0))
    rest = d_rhs - dot(d_root, solution) - d_eps * part
    multiply = lambda x: dot(root, x) + eps * x
    return solution, lax.custom_linear_solve(multiply, rest, divide, symmetric=True)


@jax.custom_jvp
def singular(matrix: jax.Array) -> jax.Array:
    r"""Return $S = \max(A^{1/2}, \phi I)$; it is differentiable."""
    values, vectors, _ = _decomposed(matrix)
    return dot(vectors * values[None], vectors.T)


@singular.defjvp
def _singular_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    r"""Return $S$, and $S'$ of which $S S' + S' S = A'$.

    What does not reach the floor stays at the floor.
    """
    (matrix,), (d_matrix,) = primals, tangents
    root = singular(matrix)
    values, vectors, known = _decomposed(lax.stop_gradient(matrix))
    sums = values[:, None] + values[None]
    inverse = jnp.where(known[:, None] | known[None], 1 / sums, 0)

    def solve(_: Any, right: jax.Array) -> jax.Array:
        inside = dot(dot(vectors.T, right), vectors)
        return dot(dot(vectors, inverse * inside), vectors.T)

    multiply = lambda x: dot(root, x) + dot(x, root)
    return root, lax.custom_linear_solve(multiply, d_matrix, solve, symmetric=True)


def by_eigenvectors(matrix: jax.Array, eps: jax.Array, rhs: jax.Array) -> jax.Array:
    """Return what `by_products` does, by an eigendecomposition."""
    values, vectors, _ = _decomposed(matrix)
    return dot(vectors, dot(vectors.T, rhs) / (values + eps))


def _decomposed(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return singular values and vectors, and which of them are above the floor."""
    values, vectors = jnp.linalg.eigh(matrix)
    floor = jnp.finfo(matrix.dtype).eps * jnp.maximum(values[-1], 1)
    return jnp.sqrt(jnp.maximum(values, floor)), vectors, values > floor


def by_products(matrix: jax.Array, eps: jax.Array, rhs: jax.Array) -> jax.Array:
    r"""Return $(\max(A^{1/2}, \phi I) + \epsilon I)^{-1} b$, all by products.

    Args:
        matrix: $A$, positive semidefinite to within rounding, shape `(m, m)`, with no
            entry above 1.
        eps: $\epsilon \ge 0$.
        rhs: $b$, shape `(m,)`.

    Returns:
        Solution, shape `(m,)`. $\phi$ is the root of the rounding unit times the
        largest eigenvalue, or times 1 where that is less. The relative error is at most
        that of an eigendecomposition in the same precision, about 1e-7 times the
        condition of $A$ up to 1e-2 for 1e7; singular values at the floor are right to
        1% of it.

    Notes:
        About 120 products of `(m, m)` matrices, a Cholesky factorisation, and one with
        pivots.
    """
    size, unit = len(matrix), jnp.finfo(matrix.dtype).eps
    eye = jnp.eye(size, dtype=matrix.dtype)
    made = pivoted.factorise(matrix, jnp.zeros_like(rhs), unit)
    # Above the largest singular value of L, by m^(1/4) at most.
    bound = 1.01 * jnp.sqrt(jnp.linalg.norm(matrix))
    bound = jnp.where(bound > 0, bound, 1)
    root = _symmetric(dot_by_rows(made.factor.T, polar(made.factor / bound)))
    floor = jnp.sqrt(unit * jnp.maximum(_largest(matrix), 1))
    above = root - floor * eye
    raised = dot_by_rows(above, _symmetric(polar(above / (bound + floor))))
    raised = _symmetric(root + floor * eye + raised) / 2
    return cholesky.solve(cholesky.factorise(raised + eps * eye), rhs)


def polar(matrix: jax.Array) -> jax.Array:
    """Return the orthogonal polar factor of a matrix.

    Args:
        matrix: Shape `(m, m)`, with singular values of at most 1.

    Returns:
        The matrix with its singular values replaced by 1, and by less where they are
        below 1% of the root of the rounding unit over m^(1/4).
    """
    smallest = _RESOLVED * math.sqrt(jnp.finfo(matrix.dtype).eps) / len(matrix) ** 0.25
    first = math.ceil(-math.log(smallest) / math.log(1.5 * _GROWTH))

    def round_(k: jax.Array, factor: jax.Array) -> jax.Array:
        growth = jnp.where(k < first, _GROWTH, 1).astype(factor.dtype)
        cubic = dot_by_rows(factor, dot_by_rows(factor.T, factor))
        return growth / 2 * (3 * factor - growth**2 * cubic)

    return lax.fori_loop(0, first + _LAST, round_, matrix)


def _largest(matrix: jax.Array) -> jax.Array:
    """Return the largest eigenvalue of a positive semidefinite matrix."""
    tiny = jnp.finfo(matrix.dtype).tiny
    normed = lambda power: power / jnp.maximum(jnp.linalg.norm(power), tiny)
    square = lambda _, power: normed(dot_by_rows(power, power))
    power = lax.fori_loop(0, _SQUARINGS, square, normed(matrix))
    # Rayleigh's quotient over all columns.
    return jnp.sum(matrix * power) / jnp.maximum(jnp.trace(power), tiny)


def _symmetric(matrix: jax.Array) -> jax.Array:
    """Return the symmetric part of a matrix."""
    return (matrix + matrix.T) / 2

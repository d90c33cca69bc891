r"""The coefficients of GGT: the inverse root of an m x m matrix.

By its eigenvectors, or where these take minutes to compile by products of matrices
alone. With $A = L L^T$ and the polar decomposition $L = S Q$, $Q^T Q = I$,

$$A^{1/2} = S, \qquad
\max(S, \phi I) = \tfrac12 \left(S + \phi I + Y \operatorname{sign} Y\right),
\quad Y = S - \phi I,$$

where $\operatorname{sign} Y$ is the polar factor of $Y$. Polar factors come from

$$X \leftarrow \tfrac{\rho}{2} X (3 I - \rho^2 X^T X),$$

which drives all singular values to one. As the condition of $L$ is the root of that of
$A$, no digits are lost that $A$ has.
"""

import math
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.numerics import at_least_zero, dot, dot_by_rows
from efcp_jax.preconditioners import cholesky, gram as grams, pivoted


# Up to this size, eigenvectors are one kernel on TPUs. Above, they take minutes to
# compile: 2 at 512 rows.
_EIGENVECTORS = 256
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


def ggt_coefficients(
    gram: jax.Array,
    scale: jax.Array,
    age: jax.Array,
    filled: jax.Array,
    eps: chex.Numeric,
    b1: chex.Numeric,
    b2: chex.Numeric,
    nesterov: bool = False,
) -> jax.Array:
    r"""Return $S D ((D S \hat K S D)^{1/2} + \epsilon I)^{-1} D^{-1} b$.

    $D = \mathrm{diag}(b_2^{age})$ lets old rows fade and $b$ is the first moment of the
    stored gradients, so that with $\tilde G = D G$ the update is exactly
    $((\tilde G^T \tilde G)^{1/2} + \epsilon I)^{-1} G^T b$. Singular values below the
    root of the rounding unit (3e-4 in float32) times the largest are taken to be that
    large, which is what the Gram matrix resolves.
    """
    dtype = gram.dtype
    b1, b2, eps = (jnp.asarray(value, dtype) for value in (b1, b2, eps))
    eps = at_least_zero(eps)  # a schedule may undershoot by a rounding error
    weights = scale * b2 ** age.astype(dtype)
    # All is measured in the largest norm, a constant. Of nothing but zeros a derivative
    # resolves what `eps` does, and without it there is none.
    fixed, squares, unit = lax.stop_gradient((weights, jnp.diagonal(gram), eps))
    largest = jnp.max(fixed * jnp.sqrt(squares))
    unit = jnp.where(largest > 0, largest, unit)
    inverse = 1 / jnp.where(unit > 0, unit, jnp.inf)
    weights = weights * inverse
    moment = grams.moment(age, filled, b1, b2, nesterov=nesterov)
    weighted = weights[:, None] * gram * weights[None]
    return weights * _solve(weighted, eps * inverse, moment)


@jax.custom_jvp
def _solve(matrix: jax.Array, eps: jax.Array, rhs: jax.Array) -> jax.Array:
    r"""Return $(S + \epsilon I)^{-1} b$ with $S = \max(A^{1/2}, \phi I)$.

    $A$ has no entry above 1, and $\phi$ is the root of the rounding unit times its
    largest eigenvalue, or times 1 where that is less.
    """
    by_vectors = lambda *given: by_eigenvectors(*given)[0]
    if len(matrix) <= _EIGENVECTORS:
        return by_vectors(matrix, eps, rhs)
    return lax.platform_dependent(matrix, eps, rhs, tpu=by_products, default=by_vectors)


@_solve.defjvp
def _solve_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    made, moved = jax.jvp(by_eigenvectors, primals, tangents)
    return made[0], moved[0]


@jax.custom_jvp
def by_eigenvectors(
    matrix: jax.Array, eps: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, ...]:
    r"""Return $x$, $S$, its eigenvalues and -vectors, and 1 for those above $\phi$."""
    values, vectors = jnp.linalg.eigh(matrix)
    floor = jnp.finfo(matrix.dtype).eps * jnp.maximum(values[-1], 1)
    singular = jnp.sqrt(jnp.maximum(values, floor))
    solution = dot(vectors, dot(vectors.T, rhs) / (singular + eps))
    root = dot(vectors * singular[None], vectors.T)
    return solution, root, singular, vectors, (values > floor).astype(matrix.dtype)


@by_eigenvectors.defjvp
def _by_eigenvectors_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    r"""Solve $S S' + S' S = A'$ and $(S + \epsilon I) x' = b' - S' x - \epsilon' x$.

    What does not reach the floor stays there, and eigenvectors are constants: they have
    no derivative where eigenvalues are equal.
    """
    d_matrix, d_eps, d_rhs = tangents
    made, eps = by_eigenvectors(*primals), primals[1]
    solution, root, *constants = made
    singular, vectors, known = lax.stop_gradient(constants)
    shifted = singular + lax.stop_gradient(eps)
    share = jnp.maximum(known[:, None], known[None])
    share = share / (singular[:, None] + singular[None])

    def divide(_: Any, right: jax.Array) -> jax.Array:
        inside = dot(dot(vectors.T, right), vectors)
        return dot(dot(vectors, share * inside), vectors.T)

    solve = lambda _, x: dot(vectors, dot(vectors.T, x) / shifted)
    both_sides = lambda x: dot(root, x) + dot(x, root)
    multiply = lambda x: dot(root, x) + eps * x
    d_root = lax.custom_linear_solve(both_sides, d_matrix, divide, symmetric=True)
    # What rounding makes up of dependent rows would be divided by the square of both.
    resolved = jnp.where(eps > singular, 1, known)
    part = dot(vectors, resolved * dot(vectors.T, solution))
    rest = d_rhs - dot(d_root, solution) - d_eps * part
    d_solution = lax.custom_linear_solve(multiply, rest, solve, symmetric=True)
    return made, (d_solution, d_root, *map(jnp.zeros_like, constants))


def by_products(matrix: jax.Array, eps: jax.Array, rhs: jax.Array) -> jax.Array:
    """Return the solution by about 120 products and two Cholesky factorisations.

    The relative error is at most that of an eigendecomposition, and singular values at
    the floor are right to 1% of it.
    """
    size, unit = len(matrix), jnp.finfo(matrix.dtype).eps
    eye = jnp.eye(size, dtype=matrix.dtype)
    row = lambda index: matrix[index]
    diagonal = jnp.diagonal(matrix)
    factor, *_ = pivoted.factorise(row, diagonal, jnp.zeros_like(rhs), unit)
    # Above the largest singular value of L, by m^(1/4) at most.
    bound = 1.01 * jnp.sqrt(jnp.linalg.norm(matrix))
    bound = jnp.where(bound > 0, bound, 1)
    symmetric = lambda matrix: (matrix + matrix.T) / 2
    root = symmetric(dot_by_rows(factor.T, _polar(factor / bound)))
    floor = jnp.sqrt(unit * jnp.maximum(_largest(matrix), 1))
    above = root - floor * eye
    raised = dot_by_rows(above, symmetric(_polar(above / (bound + floor))))
    raised = symmetric(root + floor * eye + raised) / 2
    return cholesky.solve(cholesky.factorise(raised + eps * eye), rhs)


def _polar(matrix: jax.Array) -> jax.Array:
    """Return the polar factor of a matrix with singular values of at most 1.

    They become 1, and less where they are below 1% of the root of the rounding unit
    over m^(1/4).
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

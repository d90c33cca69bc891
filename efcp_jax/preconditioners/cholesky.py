r"""Cholesky factorisations in blocks, for speed.

$$\begin{pmatrix} A & B^T \\ B & C \end{pmatrix} = L L^T, \qquad
L = \begin{pmatrix} F & \\ B F^{-T} & \mathrm{chol}(C - B F^{-T} F^{-1} B^T)
\end{pmatrix}, \quad F = \mathrm{chol}(A),$$

and the same again for both diagonal blocks. Nearly all work becomes matrix products,
which XLA runs on all cores of a CPU and on matrix units, where its Cholesky
factorisation and its triangular solution for one vector run on one core and copy the
whole matrix first.
"""

from typing import NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.numerics import dot


# Smaller blocks are not worth their calls.
UNBLOCKED = 128
# Squared distances below this many rounding errors of the matrix are rounding errors
# themselves.
_NOISE = 10.0


class Blocked(NamedTuple):
    """A lower triangular factor in blocks: $F$, $B F^{-T}$ below it, and the rest."""

    first: "Factor"
    below: jax.Array
    second: "Factor"


# One block is kept as the transpose of its factor: LAPACK wants columns contiguous, and
# a row-major array has that once it is transposed, without a copy before JAX 0.12.
Factor: TypeAlias = jax.Array | Blocked


def factorise(matrix: jax.Array, unblocked: int = UNBLOCKED) -> Factor:
    """Return the factor of a symmetric matrix, of which the lower half is read.

    Blocks of up to `unblocked` rows are left to the library. Pivots of matrices that
    are not positive definite are NaN.
    """
    size = len(matrix)
    if size <= unblocked:
        return lax.linalg.cholesky(matrix, symmetrize_input=False).T
    half = size // 2
    first = factorise(matrix[:half, :half], unblocked)
    below = solve_right(first, matrix[half:, :half])
    second = factorise(matrix[half:, half:] - dot(below, below.T), unblocked)
    return Blocked(first, below, second)


def pivots(factor: Factor) -> jax.Array:
    """Return the diagonal of the factor."""
    if not isinstance(factor, Blocked):
        return jnp.diagonal(factor)
    return jnp.concatenate([pivots(factor.first), pivots(factor.second)])


def is_sound(factor: Factor) -> jax.Array:
    """Return whether no row depends on others to within rounding."""
    # Squared pivots are the squared distances of each row from those before it.
    squares = pivots(factor) ** 2
    return jnp.all(squares > _NOISE * jnp.finfo(squares.dtype).eps)  # False for NaN


def solve(factor: Factor, rhs: jax.Array) -> jax.Array:
    """Return the solution of $L L^T x = b$ for a vector."""
    return backward(factor, forward(factor, rhs))


def forward(factor: Factor, rhs: jax.Array) -> jax.Array:
    """Solve $L x = b$ for a vector."""
    if not isinstance(factor, Blocked):
        return lax.linalg.triangular_solve(
            factor.T, rhs[:, None], left_side=True, lower=True
        )[:, 0]
    half = factor.below.shape[1]
    first = forward(factor.first, rhs[:half])
    second = forward(factor.second, rhs[half:] - dot(factor.below, first))
    return jnp.concatenate([first, second])


def backward(factor: Factor, rhs: jax.Array) -> jax.Array:
    """Solve $L^T x = b$ for a vector."""
    if not isinstance(factor, Blocked):
        return lax.linalg.triangular_solve(
            factor.T, rhs[:, None], left_side=True, lower=True, transpose_a=True
        )[:, 0]
    half = factor.below.shape[1]
    second = backward(factor.second, rhs[half:])
    first = backward(factor.first, rhs[:half] - dot(second, factor.below))
    return jnp.concatenate([first, second])


def solve_right(factor: Factor, rhs: jax.Array) -> jax.Array:
    """Solve $X L^T = B$ for a matrix."""
    if not isinstance(factor, Blocked):
        return lax.linalg.triangular_solve(
            factor.T, rhs, left_side=False, lower=True, transpose_a=True
        )
    half = factor.below.shape[1]
    first = solve_right(factor.first, rhs[:, :half])
    rest = rhs[:, half:] - dot(first, factor.below.T)
    return jnp.concatenate([first, solve_right(factor.second, rest)], axis=1)

r"""Cholesky factorisations, in blocks for speed and with pivots for dependent rows.

$$\begin{pmatrix} A & B^T \\ B & C \end{pmatrix} = L L^T, \qquad
L = \begin{pmatrix} F & \\ B F^{-T} & \mathrm{chol}(C - B F^{-T} F^{-1} B^T)
\end{pmatrix}, \quad F = \mathrm{chol}(A),$$

and the same again for both diagonal blocks. Nearly all work becomes matrix products,
which XLA runs on all cores of a CPU and on matrix units, where its Cholesky
factorisation and its triangular solution for one vector run on one core and copy the
whole matrix first. With pivots,

$$A \approx L L^T, \qquad
l_k = \frac{S_{p_k}}{\sqrt{S_{p_k p_k}}}, \quad S \leftarrow S - l_k l_k^T,$$

where $S$ begins as $A$ and $p_k$ is the row that is farthest from the span of those
before it. All rounds are alike, so the program is one small loop: it compiles in a
second on any platform, where SVDs and eigendecompositions of more than 256 rows take
minutes on TPUs, and it asks no host.
"""

from typing import NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.collectives import vary_like
from efcp_jax.numerics import by_rows, dot, dot_by_rows


# Smaller blocks are not worth their calls.
UNBLOCKED = 128
# Up to this size a factorisation is left to the library, which GPUs run as one kernel.
_WHOLE = 512
# Squared distances below this many rounding errors of the matrix are rounding errors
# themselves.
_NOISE = 10.0


class Blocked(NamedTuple):
    """A lower triangular factor in blocks: $F$, $B F^{-T}$ below it, and the rest."""

    first: "Factor"
    below: jax.Array
    second: "Factor"


# One block is kept as the transpose of its factor: LAPACK wants columns contiguous, and
# a row-major array has that without a copy once it is transposed.
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


def pivoted(
    matrix: jax.Array, squares: jax.Array, noise: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    r"""Return $L^T$ and $p$ of a positive semidefinite matrix; 0 and m behind its rank.

    `squares` are logarithms of weights $\rho^2$: the pivot is the row with the largest
    $\rho_i^2 S_{ii}$, so that $\rho_i |L_{ik}|$ is largest at it. Rows with $S_{ii}$ of
    at most `noise` are left out; that and m rounding errors of the diagonal bound
    $|A - L L^T|$. There are m rounds whatever the rank: a loop that ends early would
    ask the host every round on GPUs.
    """
    size = len(matrix)
    index = jnp.arange(size, dtype=jnp.int32)

    def round_(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        schur, left, factor, order = carry
        # What is left of a row only falls, so one left out stays out.
        open_ = left > noise
        score = jnp.where(open_, jnp.log(jnp.where(open_, left, 1)) + squares, -jnp.inf)
        pivot = jnp.argmax(score).astype(jnp.int32)
        found = open_[pivot]
        root = jnp.sqrt(jnp.where(found, left[pivot], 1))
        column = jnp.where(found & open_, schur[pivot] / root, 0)
        schur = schur - column[:, None] * column[None]
        left = jnp.where(index == pivot, -1, left - column**2)
        factor = lax.dynamic_update_slice_in_dim(factor, column[None], k, axis=0)
        order = jnp.where(index == k, jnp.where(found, pivot, size), order)
        return schur, left, factor, order

    empty = jnp.zeros_like(matrix), jnp.full_like(index, size)
    start = vary_like(matrix, (matrix, jnp.diagonal(matrix), *empty))
    _, _, factor, order = lax.fori_loop(0, size, round_, start)
    return factor, order


def solve_in_basis(
    matrix: jax.Array, inverse: jax.Array, rhs: jax.Array, unit: jax.Array
) -> jax.Array:
    r"""Solve $D A D x = D b / \mu$ where rows depend on each other but for rounding.

    With a basis $B$ of the rows of $A = G G^T$, and $T$ all rows by it, $G = T G_B$,
    the limit of $(\delta I + A)^{-1} b$ on the range of $A$ is, to within its null
    space,

    $$w_B = A_{BB}^{-1} (T^T T)^{-1} T^T b, \qquad T^T T = I + T_Q^T T_Q,$$

    and 0 for the other rows $Q$. $D A D$ has a diagonal of ones. The relative error is
    that of a Cholesky factorisation of the basis, however the norms of the rows differ.
    """
    size, index = len(matrix), jnp.arange(len(matrix))
    # The Frobenius norm is at least the largest eigenvalue, and what rounding leaves of
    # dependent rows grows with the number of rows.
    noise = _NOISE * jnp.finfo(matrix.dtype).eps * jnp.linalg.norm(matrix)
    # By distances in the unit of the gradient, entries of T are about 1 at most: long
    # rows are never made of short ones.
    factor, order = pivoted(matrix, -2 * jnp.log(inverse), noise)
    taken = order < size
    chosen = order[:, None] == index[None]
    place = jnp.minimum(order, size - 1)
    eye = jnp.eye(size, dtype=matrix.dtype)
    basis = jnp.where(taken[:, None], factor.T[place], eye)
    others = jnp.where(jnp.any(chosen, axis=0), 0, factor)
    by_basis = by_rows(
        lambda rows: lax.linalg.triangular_solve(basis, rows, lower=True), others.T
    ).T
    # Where a ratio is out of range, the entry it belongs to is 0.
    largest = 1 / jnp.finfo(matrix.dtype).tiny
    scales = jnp.where(taken, inverse[place], 1)
    by_basis = jnp.minimum(scales[:, None] / inverse[None], largest) * by_basis
    rhs = dot(by_basis, rhs) + dot(chosen.astype(rhs.dtype), rhs)
    normal = factorise(eye + dot_by_rows(by_basis, by_basis.T), _WHOLE)
    weights = jnp.minimum(scales / unit, largest) * solve(normal, rhs)
    # One block is the transpose of its factor.
    weights = solve(basis.T, weights)
    return dot(jnp.where(taken, weights, 0), chosen.astype(matrix.dtype))

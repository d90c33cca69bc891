r"""Cholesky factorisation with pivots, which tells dependent rows from the others.

$$A \approx L L^T, \qquad
l_k = \frac{S_{p_k}}{\sqrt{S_{p_k p_k}}}, \quad S \leftarrow S - l_k l_k^T,$$

where $S$ begins as $A$ and $p_k$ is the row that is farthest from the span of those
before it. Rows within `noise` of that span are left out. All rounds are alike, so the
program is one small loop: it compiles in a second on any platform, where SVDs and
eigendecompositions of more than 256 rows take minutes on TPUs, and it asks no host.

With a basis $B$ of the rows, and $T$ all rows by it, $G = T G_B$, the limit of
$(\delta I + A)^{-1} b$ on the range of $A = G G^T$ is, to within its null space,

$$w_B = A_{BB}^{-1} (T^T T)^{-1} T^T b, \qquad T^T T = I + T_Q^T T_Q,$$

and 0 for the other rows $Q$.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax import varying
from efcp_jax.numerics import by_rows, dot, dot_by_rows
from efcp_jax.preconditioners import cholesky


# Up to this size a factorisation is left to the library, which GPUs run as one kernel.
_WHOLE = 512


class Pivoted(NamedTuple):
    """A factor of m columns, as many of them 0 as rows depend on the others.

    Attributes:
        factor: $L^T$, shape `(m, m)`; rows behind the rank are 0.
        order: $p$, int32, shape `(m,)`; m behind the rank.
    """

    factor: jax.Array
    order: jax.Array


def factorise(
    matrix: jax.Array, squares: jax.Array, noise: jax.typing.ArrayLike
) -> Pivoted:
    r"""Return the factor of a positive semidefinite matrix with pivots.

    Args:
        matrix: $A$, symmetric, shape `(m, m)`.
        squares: Logarithms of weights $\rho^2$, shape `(m,)`. The pivot is the row with
            the largest $\rho_i^2 S_{ii}$, so that $\rho_i |L_{ik}|$ is largest at it.
        noise: Rows with $S_{ii}$ of at most this are left out, a positive scalar.

    Returns:
        Factor and order. $|A - L L^T|$ is about `noise` plus m rounding errors of the
        diagonal, entry by entry.

    Notes:
        m rounds of 2 m^2 operations, whatever the rank: a loop that ends early would
        ask the host every round on GPUs.
    """
    size = len(matrix)
    index = jnp.arange(size, dtype=jnp.int32)

    def round_(
        k: jax.Array, carry: tuple[jax.Array, jax.Array, Pivoted]
    ) -> tuple[jax.Array, jax.Array, Pivoted]:
        schur, left, made = carry
        # What is left of a row only falls, so one left out stays out.
        open_ = left > noise
        score = jnp.where(open_, jnp.log(jnp.where(open_, left, 1)) + squares, -jnp.inf)
        pivot = jnp.argmax(score).astype(jnp.int32)
        found = open_[pivot]
        root = jnp.sqrt(jnp.where(found, left[pivot], 1))
        column = jnp.where(found & open_, schur[pivot] / root, 0)
        schur = schur - column[:, None] * column[None]
        left = jnp.where(index == pivot, -1, left - column**2)
        factor = lax.dynamic_update_slice_in_dim(made.factor, column[None], k, axis=0)
        order = jnp.where(index == k, jnp.where(found, pivot, size), made.order)
        return schur, left, Pivoted(factor, order)

    empty = Pivoted(jnp.zeros_like(matrix), jnp.full_like(index, size))
    start = varying.like(matrix, (matrix, jnp.diagonal(matrix), empty))
    return lax.fori_loop(0, size, round_, start)[2]


def solve(
    matrix: jax.Array,
    inverse: jax.Array,
    rhs: jax.Array,
    unit: jax.Array,
    noise: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Return $x$ of which $\mu D x$ is the limit of $(\delta I + A)^{-1} b$.

    Args:
        matrix: $D A D$, positive semidefinite with a diagonal of ones, shape `(m, m)`.
        inverse: The diagonal of $D$, shape `(m,)`, of any range.
        rhs: $b$, shape `(m,)`.
        unit: $\mu$, at least the largest entry of $D b$.
        noise: Squared distances of at most this are taken to be 0, a positive scalar.

    Returns:
        $x$ to within the null space, shape `(m,)`; 0 for rows that depend on others.
        Its relative error is that of a Cholesky factorisation of the other rows,
        however the norms of the rows differ.

    Notes:
        About 6 m^3 operations.
    """
    size, index = len(matrix), jnp.arange(len(matrix))
    # By distances in the unit of the gradient, entries of T are about 1 at most: long
    # rows are never made of short ones.
    made = factorise(matrix, -2 * jnp.log(inverse), noise)
    taken = made.order < size
    chosen = made.order[:, None] == index[None]
    place = jnp.minimum(made.order, size - 1)
    eye = jnp.eye(size, dtype=matrix.dtype)
    basis = jnp.where(taken[:, None], made.factor.T[place], eye)
    others = jnp.where(jnp.any(chosen, axis=0), 0, made.factor)
    by_basis = by_rows(
        lambda rows: lax.linalg.triangular_solve(basis, rows, lower=True), others.T
    ).T
    # Where a ratio is out of range, the entry it belongs to is 0.
    largest = 1 / jnp.finfo(matrix.dtype).tiny
    scales = jnp.where(taken, inverse[place], 1)
    by_basis = jnp.minimum(scales[:, None] / inverse[None], largest) * by_basis
    rhs = dot(by_basis, rhs) + dot(chosen.astype(rhs.dtype), rhs)
    normal = eye + dot_by_rows(by_basis, by_basis.T)
    normal = cholesky.factorise(normal, _WHOLE)
    weights = cholesky.solve(normal, rhs)
    weights = jnp.minimum(scales / unit, largest) * weights
    # One block is the transpose of its factor.
    weights = cholesky.solve(basis.T, weights)
    return dot(jnp.where(taken, weights, 0), chosen.astype(matrix.dtype))

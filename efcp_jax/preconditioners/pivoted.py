r"""Cholesky factorisation with pivots, and solutions where rows depend on each other.

$$A \approx L L^T, \qquad
l_k = \frac{S_{p_k}}{\sqrt{S_{p_k p_k}}}, \quad S = A - \sum_{i < k} l_i l_i^T,$$

where $p_k$ is the row that is farthest from the span of those before it. All rounds are
alike, so the program is one small loop: it compiles in a second on any platform, where
SVDs and eigendecompositions of more than 256 rows take minutes on TPUs, and it asks no
host.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.collectives import vary_like
from efcp_jax.numerics import dot
from efcp_jax.preconditioners import cholesky


# A matrix that is not held: what makes one of its rows.
Row: TypeAlias = Callable[[jax.Array], jax.Array]

# Up to this size a factorisation is left to the library, which GPUs run as one kernel.
_WHOLE = 512
# Rows that are written in a basis at once.
_ROWS = 256
# Squared distances below this many rounding errors of the matrix are rounding errors
# themselves.
_NOISE = 10.0


def factorise(
    row: Row, diagonal: jax.Array, squares: jax.Array, noise: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Return $L^T$, the order $p$ of all rows and the rank of a matrix, given by rows.

    `squares` are logarithms of weights $\rho^2$: the pivot is the row with the largest
    $\rho_i^2 S_{ii}$, so that $\rho_i |L_{ik}|$ is largest at it. Rows with $S_{ii}$ of
    at most `noise` come last, with zeros in $L^T$; that and m rounding errors of the
    diagonal bound $|A - L L^T|$. There are m rounds whatever the rank: a loop that ends
    early would ask the host every round on GPUs. Only $L^T$ is held and read: a round
    takes $S_{p_k}$ from the row of A and the factor so far.
    """
    size = len(diagonal)
    index = jnp.arange(size, dtype=jnp.int32)
    lowest = jnp.finfo(diagonal.dtype).min

    def round_(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, factor, order, rank = carry
        # What is left of a row only falls, so one left out stays out.
        open_ = left > noise
        score = jnp.where(open_, jnp.log(jnp.where(open_, left, 1)) + squares, lowest)
        pivot = jnp.argmax(jnp.where(left == -jnp.inf, left, score)).astype(jnp.int32)
        found = open_[pivot]
        root = jnp.sqrt(jnp.where(found, left[pivot], 1))
        column = (row(pivot) - dot(factor[:, pivot], factor)) / root
        column = jnp.where(index == pivot, root, jnp.where(open_, column, 0))
        column = jnp.where(found, column, 0)
        left = jnp.where(index == pivot, -jnp.inf, left - column**2)
        factor = lax.dynamic_update_slice_in_dim(factor, column[None], k, axis=0)
        order = jnp.where(index == k, pivot, order)
        return left, factor, order, rank + found.astype(rank.dtype)

    factor = jnp.zeros((size, size), diagonal.dtype)
    start = (diagonal, factor, jnp.zeros_like(index), jnp.int32(0))
    start = vary_like((row(jnp.int32(0)), squares, start), start)
    _, factor, order, rank = lax.fori_loop(0, size, round_, start)
    return factor, order, rank


def solve(
    row: Row, norm: jax.Array, inverse: jax.Array, rhs: jax.Array, unit: jax.Array
) -> jax.Array:
    r"""Solve $D A D x = D b / \mu$ where rows depend on each other but for rounding.

    With a basis $B$ of the rows of $A = G G^T$, and $T$ all rows by it, $G = T G_B$,
    the limit of $(\delta I + A)^{-1} b$ on the range of $A$ is, to within its null
    space,

    $$w_B = A_{BB}^{-1} (T^T T)^{-1} T^T b, \qquad T^T T = I + T_Q^T T_Q,$$

    and 0 for the other rows $Q$. `row` makes those of $D A D$, which has a diagonal of
    ones; `norm` is its Frobenius norm. The relative error is that of a Cholesky
    factorisation of the basis, however the norms of the rows differ. $T$ is made some
    rows at a time, and anew for each of its two uses, so that besides one product two
    matrices of m x m are held.
    """
    size, dtype = len(inverse), inverse.dtype
    index = jnp.arange(size)
    # The Frobenius norm is at least the largest eigenvalue, and what rounding leaves of
    # dependent rows grows with the number of rows.
    noise = _NOISE * jnp.finfo(dtype).eps * norm
    # By distances in the unit of the gradient, entries of T are about 1 at most: long
    # rows are never made of short ones.
    squares = -2 * jnp.log(inverse)
    factor, order, rank = factorise(row, jnp.ones_like(inverse), squares, noise)
    # In this order $L$ is $(L_B, 0; L_Q, 0)$, and with $I$ in its corner regular.
    taken = index < rank
    corner = ~taken[:, None] & (index[:, None] == index[None])
    lower = jnp.where(corner, 1, factor.T[order])
    scales, rhs = inverse[order], rhs[order]
    # Where a ratio is out of range, the entry it belongs to is 0.
    largest = 1 / jnp.finfo(dtype).tiny
    count = min(size, _ROWS)
    blocks = -(-size // count)

    def part(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return where a block of the rows of T begins, and the block."""
        # The last block begins early, with rows of zeros for those there are already.
        start = jnp.minimum(block * count, size - count)
        place = start + index[:count]
        other = (place >= rank) & (place >= block * count)
        rows = lax.dynamic_slice_in_dim(lower, start, count)
        rows = jnp.where(other[:, None] & taken[None], rows, 0)
        rows = lax.linalg.triangular_solve(lower, rows, lower=True)
        ratio = scales[None] / lax.dynamic_slice_in_dim(scales, start, count)[:, None]
        return start, jnp.minimum(ratio, largest) * rows

    def products(block: jax.Array, total: jax.Array) -> jax.Array:
        _, rows = part(block)
        return total + dot(rows.T, rows)

    def moments(block: jax.Array) -> jax.Array:
        start, rows = part(block)
        return dot(lax.dynamic_slice_in_dim(rhs, start, count), rows)

    normal = vary_like(lower, jnp.eye(size, dtype=dtype))
    normal = cholesky.factorise(lax.fori_loop(0, blocks, products, normal), _WHOLE)
    rhs = jnp.sum(lax.map(moments, jnp.arange(blocks)), 0) + jnp.where(taken, rhs, 0)
    weights = jnp.minimum(scales / unit, largest) * cholesky.solve(normal, rhs)
    # One block is the transpose of its factor.
    weights = jnp.where(taken, cholesky.forward(lower.T, weights), 0)
    weights = cholesky.backward(lower.T, weights)
    chosen = taken[:, None] & (order[:, None] == index[None])
    return jnp.sum(jnp.where(chosen, weights[:, None], 0), axis=0)

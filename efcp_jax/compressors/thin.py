"""Thin factors: products of them, and orthonormal bases of their rows."""

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.collectives import Routine
from efcp_jax.numerics import contract, roots, saturate
from efcp_jax.passes import subtract_products


# Up to this rank a product is subtracted in one pass. Above, a matrix unit or a library
# is faster. Products of less than this many entries take no memory to speak of.
_THIN = 8
_SMALL = 65_536

# Up to this rank the factorisation is written out, entry by entry: a few fused
# operations on accelerators, whose libraries take a kernel a column or more.
_WRITTEN_OUT = 4


def subtract(
    values: jax.Array, left: jax.Array, right: jax.Array, factor: jax.Array
) -> jax.Array:
    """Return `values` minus `factor` $L^T R$, within the range of their dtype.

    Shapes are `(g, rows, cols)`, `(g, r, rows)` and `(g, r, cols)`; `factor` is a power
    of two.
    """
    first, second = roots(factor, values.dtype)
    left = left.astype(values.dtype) * first
    right = right.astype(values.dtype)
    # The rounding of one pass depends on what the compiler joins in it. Small products
    # are the same in every program.
    if right.shape[1] > _THIN or values.size <= _SMALL:
        # The power of two comes last: compilers join it with the sum, which rounds
        # nothing.
        rest = values - second * contract("grn,grc->gnc", left, right)
    else:
        rest = subtract_products(values, left, right, second)
    return saturate(rest, values.dtype)


def orthonormal(matrices: jax.Array, axes: tuple[str, ...]) -> Routine:
    r"""Return an orthonormal basis of the rows of each matrix by shifted Cholesky-QR.

    $Q = \mathrm{chol}(Y Y^T + \delta I)^{-1} Y$, twice, of matrices `(g, r, n)` whose
    columns are divided over `axes`. Zero rows stay zero. Dependent rows give directions
    of rounding size, which the second pass turns into arbitrary orthonormal ones:
    harmless, since a projection on the rows of $Q$ stays one.
    """
    # The first pass leaves rows of length 1, so no square of the second overflows.
    peak = yield lax.pmax, jnp.max(jnp.abs(matrices), axis=2), axes
    matrices = matrices / jnp.where(peak > 0, peak, 1)[:, :, None]
    for _ in range(2):
        gram = contract("grn,gsn->grs", matrices, matrices)
        gram = yield lax.psum, gram, axes
        # The Gram matrices of all groups in one batch.
        inverse = yield _inverse_factor, gram, None
        matrices = contract("grs,gsn->grn", inverse, matrices)
    return matrices


def _inverse_factor(gram: jax.Array) -> jax.Array:
    """Return lower triangular T, T K T^T about I, for Gram matrices `(g, r, r)`.

    Rows and columns of zeros are as if they had a one on the diagonal.
    """
    rank, dtype = gram.shape[-1], gram.dtype
    # Above the rounding of an (r, r) Gram matrix of unit diagonal.
    shift = 8 * rank * jnp.finfo(dtype).eps
    eye = jnp.eye(rank, dtype=dtype)[None]
    square = jnp.diagonal(gram, axis1=1, axis2=2)
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    scaled = gram / (length[:, None, :] * length[:, :, None])
    scaled = scaled * (1 - eye) + (1 + shift) * eye
    if rank <= _WRITTEN_OUT:
        inverse = _written_out(scaled)
    else:
        factor = lax.linalg.cholesky(scaled)
        inverse = lax.linalg.triangular_solve(
            factor, jnp.broadcast_to(eye, gram.shape), left_side=True, lower=True
        )
    return inverse / length[:, None, :]


def _written_out(matrix: jax.Array) -> jax.Array:
    """Return the inverse Cholesky factors of `(g, r, r)` matrices, entry by entry."""
    size = range(matrix.shape[-1])
    factor, inverse = {}, {}
    for j in size:
        pivot = matrix[:, j, j] - sum(factor[j, k] ** 2 for k in range(j))
        inverse[j, j] = 1 / jnp.sqrt(pivot)
        for i in size[j + 1 :]:
            rest = matrix[:, i, j] - sum(factor[i, k] * factor[j, k] for k in range(j))
            factor[i, j] = rest * inverse[j, j]
        for i in range(j):
            known = sum(factor[j, k] * inverse[k, i] for k in range(i, j))
            inverse[j, i] = -known * inverse[j, j]
    zero = jnp.zeros_like(matrix[:, 0, 0])
    rows = [jnp.stack([inverse.get((i, j), zero) for j in size], 1) for i in size]
    return jnp.stack(rows, axis=1)

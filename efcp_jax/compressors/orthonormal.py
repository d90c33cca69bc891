"""Orthonormal bases of the rows of thin matrices, by products and small factors."""

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.collectives import Routine
from efcp_jax.numerics import contract


# Up to this rank the factorisation is written out, entry by entry: a few fused
# operations on accelerators, whose libraries take a kernel a column or more.
_WRITTEN_OUT = 4


def orthonormal(matrices: jax.Array, axes: tuple[str, ...]) -> Routine:
    r"""Return an orthonormal basis of the rows of each matrix by shifted Cholesky-QR.

    $Q = \mathrm{chol}(Y Y^T + \delta I)^{-1} Y$, twice. Only products and an `(r, r)`
    factorisation, so it runs on matrix units and, with columns divided over `axes`,
    sums r^2 numbers between devices. Zero rows stay zero. Dependent rows give
    directions of rounding size, which the second pass turns into arbitrary orthonormal
    ones: harmless, since a projection on the rows of $Q$ stays one.

    Args:
        matrices: Shape `(g, r, n)`, this device's columns.
        axes: Mesh axes that divide the columns.

    Returns:
        A routine whose result is an array of the shape of `matrices`.
    """
    # The first pass leaves rows of length 1, so no square of the second overflows.
    peak = yield lax.pmax, jnp.max(jnp.abs(matrices), axis=2), axes
    matrices = matrices / jnp.where(peak > 0, peak, 1)[:, :, None]
    for _ in range(2):
        gram = contract("grn,gsn->grs", matrices, matrices)
        gram = yield lax.psum, gram, axes
        # The Gram matrices of all groups in one batch.
        inverse = yield inverse_factor, gram, None
        matrices = contract("grs,gsn->grn", inverse, matrices)
    return matrices


def inverse_factor(gram: jax.Array) -> jax.Array:
    """Return the inverse Cholesky factors of Gram matrices, slightly shifted.

    Args:
        gram: Shape `(g, r, r)`.

    Returns:
        Lower triangular matrices, `(g, r, r)`, with $T K T^T$ about $I$; rows and
        columns of zeros are as if they had a one on the diagonal.
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

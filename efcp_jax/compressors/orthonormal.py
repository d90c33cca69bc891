"""An orthonormal basis of the columns of a matrix, by products and small factors."""

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.routines import Routine
from efcp_jax.numerics import dot


def orthonormal(matrix: jax.Array, axes: tuple[str, ...]) -> Routine:
    r"""Return an orthonormal basis of the columns of `matrix` by shifted Cholesky-QR.

    $Q = Y \mathrm{chol}(Y^T Y + \delta I)^{-T}$, twice. Only products and an `(r, r)`
    factorisation, so it runs on matrix units and, with rows divided over `axes`, sums
    r^2 numbers between devices. Zero columns stay zero. Dependent columns give
    directions of rounding size, which the second pass turns into arbitrary orthonormal
    ones: harmless, since $Q Q^T A$ stays a projection of $A$.

    Args:
        matrix: Shape `(rows, r)`, this device's rows.
        axes: Mesh axes that divide the rows.

    Returns:
        A routine whose result is an array of the shape of `matrix`.
    """
    rank = matrix.shape[1]
    # Above the rounding of an (r, r) Gram matrix of unit diagonal.
    shift = 8 * rank * jnp.finfo(matrix.dtype).eps
    eye = jnp.eye(rank, dtype=matrix.dtype)
    for _ in range(2):
        peak = yield lax.pmax, jnp.max(jnp.abs(matrix), axis=0), axes
        matrix = matrix / jnp.where(peak > 0, peak, 1)
        gram = yield lax.psum, dot(matrix.T, matrix), axes
        square = jnp.diagonal(gram)
        length = jnp.sqrt(jnp.where(square > 0, square, 1))
        matrix = matrix / length
        gram = gram / (length * length[:, None]) * (1 - eye) + eye
        factor = jnp.linalg.cholesky(gram + shift * eye)
        matrix = lax.linalg.triangular_solve(
            factor, matrix, left_side=False, lower=True, transpose_a=True
        )
    return matrix

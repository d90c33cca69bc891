"""The coefficients of GGT: the inverse root of an m x m matrix."""

from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.numerics import at_least_zero
from efcp_jax.preconditioners import gram as grams, root


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
    stored gradients, see `gram.moment`, so that the update is
    $((\tilde G^T \tilde G)^{1/2} + \epsilon I)^{-1} G^T b$ with $\tilde G = D G$,
    exactly.

    Args:
        gram: $\hat K$, shape `(m, m)`.
        scale: $s$, shape `(m,)`; 0 for empty slots.
        age: Age of every slot, 0 for the newest, shape `(m,)`.
        filled: Number of slots that hold a row, at least 1.
        eps: $\epsilon \ge 0$, in the unit of a gradient norm. Singular values below the
            root of the rounding unit (3e-4 in float32) times the largest are taken to
            be that large, which is what the Gram matrix resolves.
        b1: Decay of the first moment, in [0, 1), at most `b2`.
        b2: Decay of the rows, in (0, 1].
        nesterov: Whether the moment looks ahead.

    Returns:
        Coefficients of the stored rows, shape `(m,)`, in the dtype of `gram`.

    References:
        Agarwal et al., `Efficient Full-Matrix Adaptive Regularization
        <https://arxiv.org/abs/1806.02958>`_, 2019

    Notes:
        One symmetric eigendecomposition, about 10 m^3 operations; on TPUs, for more
        than 256 rows, about 120 matrix products instead.
    """
    dtype = gram.dtype
    b1, b2, eps = (jnp.asarray(value, dtype) for value in (b1, b2, eps))
    eps = at_least_zero(eps)  # a schedule may undershoot by a rounding error
    weights = scale * b2 ** age.astype(dtype)
    inverse = _inverse_unit(weights, jnp.diagonal(gram), eps)
    weights = weights * inverse
    moment = grams.moment(age, filled, b1, b2, nesterov=nesterov)
    weighted = weights[:, None] * gram * weights[None]
    given = weighted, eps * inverse, moment
    return weights * root.solve(*given)


@jax.custom_jvp
def _inverse_unit(weights: jax.Array, squares: jax.Array, eps: jax.Array) -> jax.Array:
    """Return one over the largest norm, which all is measured in."""
    del eps
    largest = jnp.max(weights * jnp.sqrt(squares))
    return 1 / jnp.where(largest > 0, largest, 1)


@_inverse_unit.defjvp
def _inverse_unit_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Return a constant: on a unit nothing depends.

    Where a derivative is taken at nothing but zeros, `eps` is what is to be resolved;
    without it there is none.
    """
    del tangents
    weights, squares, eps = primals
    largest = jnp.max(weights * jnp.sqrt(squares))
    unit = jnp.where(largest > 0, largest, eps)
    inverse = jnp.where(unit > 0, 1 / jnp.where(unit > 0, unit, 1), 0)
    return lax.stop_gradient(inverse), jnp.zeros_like(inverse)

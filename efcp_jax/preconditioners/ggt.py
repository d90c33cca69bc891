"""The coefficients of GGT: the inverse root of an m x m matrix."""

import chex
import jax
from jax import lax
import jax.numpy as jnp

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
    # A schedule may undershoot by a rounding error. The slope at 0 is that above.
    eps = jnp.where(eps < 0, 0, eps)
    weights = scale * b2 ** age.astype(dtype)
    # The unit that all is measured in, of which the result does not depend.
    *given, unit = lax.stop_gradient((weights, jnp.diagonal(gram), eps))
    largest = jnp.max(given[0] * jnp.sqrt(given[1]))
    unit = jnp.where(largest > 0, largest, unit)
    inverse = jnp.where(unit > 0, 1 / jnp.where(unit > 0, unit, 1), 0)
    weights = weights * inverse
    moment = grams.moment(age, filled, b1, b2, nesterov=nesterov)
    weighted = weights[:, None] * gram * weights[None]
    given = weighted, eps * inverse, moment
    return weights * root.solve(*given)

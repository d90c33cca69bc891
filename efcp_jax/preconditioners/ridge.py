r"""Solution of $(S \hat K S + \rho I) w = b$ for any right-hand side."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efcp_jax.numerics import dot


# Eigenvalues below so many rounding errors a row are rounding errors.
_NOISE = 2.0


class Ridge(NamedTuple):
    r"""The matrix $D (S \hat K S + \rho I) D$ of unit diagonal.

    Attributes:
        weights: The diagonal of $S D$, shape `(m,)`.
        shift: The diagonal of $\rho D^2$, shape `(m,)`, in (0, 1].
        values: Eigenvalues, shape `(m,)`, at least what rounding makes up.
        vectors: Eigenvectors, in columns, shape `(m, m)`.
    """

    weights: jax.Array
    shift: jax.Array
    values: jax.Array
    vectors: jax.Array

    def residual(self, products: jax.Array, solution: jax.Array) -> jax.Array:
        r"""Return $D (S \hat b - \rho w)$ from $\hat b$ and $v$, where $w = D v$."""
        return self.weights * products - self.shift * solution

    def solve(self, residual: jax.Array) -> jax.Array:
        """Return the solution of the scaled system."""
        return dot(self.vectors, dot(residual, self.vectors) / self.values)


def ridge(gram: jax.Array, scale: jax.Array, shift: jax.Array) -> Ridge:
    r"""Return the system, ready to be solved.

    Args:
        gram: $\hat K$, shape `(m, m)`.
        scale: $s$, shape `(m,)`; 0 for empty slots.
        shift: $\rho > 0$.

    Returns:
        A `Ridge`. Costs an eigendecomposition, about 10 m^3 operations.
    """
    # In two steps, since a squared norm may overflow.
    lengths = jnp.hypot(scale * jnp.sqrt(jnp.diagonal(gram)), jnp.sqrt(shift))
    inverse = 1 / lengths
    weights = scale * inverse
    share = (jnp.sqrt(shift) * inverse) ** 2
    matrix = weights[:, None] * gram * weights[None]
    diagonal = jnp.eye(len(scale), dtype=bool)
    values, vectors = jnp.linalg.eigh(jnp.where(diagonal, 1, matrix))
    noise = _NOISE * len(scale) * jnp.finfo(gram.dtype).eps
    return Ridge(weights, share, jnp.maximum(values, noise), vectors)

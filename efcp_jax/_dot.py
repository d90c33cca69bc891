"""The matrix product of everything that feeds a Gram matrix or a solution."""

import jax
from jax import lax
import jax.numpy as jnp


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return the product in full precision, which accelerators do not by default."""
    return jnp.dot(left, right, precision=lax.Precision.HIGHEST)

"""Products, casts and scales that lose nothing they need not lose."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return the product in full precision, which accelerators do not by default."""
    return jnp.dot(left, right, precision=lax.Precision.HIGHEST)


def saturate(value: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Cast to `dtype`; what overflows becomes its largest number, NaN stays NaN."""
    limit = min(float(jnp.finfo(each).max) for each in (dtype, value.dtype))
    return jnp.clip(value, -limit, limit).astype(dtype)


def cast(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """Cast to `dtype`, within its range."""
    if jnp.issubdtype(dtype, jnp.floating) and dtype != value.dtype:
        return saturate(value, dtype)
    return value.astype(dtype)


def power_of_two(peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the least power of two above `peak`, and its inverse; zeros for zero.

    Both are normal numbers, so multiplying by one and then the other is exact.
    """
    info = jnp.finfo(peak.dtype)
    _, exponent = jnp.frexp(peak)
    exponent = jnp.clip(exponent, info.minexp + 2, info.maxexp - 2)
    one = jnp.ones_like(peak)
    scale, inverse = jnp.ldexp(one, exponent), jnp.ldexp(one, -exponent)
    zero = jnp.zeros_like(peak)
    return jnp.where(peak > 0, scale, zero), jnp.where(peak > 0, inverse, zero)

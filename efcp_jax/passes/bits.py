"""Numbers that kernels cannot load as such, made from their bit patterns."""

import jax
from jax import lax
import jax.numpy as jnp


# What is loaded in place of a dtype.
_PATTERNS = {
    jnp.dtype(jnp.float16): jnp.int16,
    jnp.dtype(jnp.float8_e4m3fn): jnp.uint8,
}


def readable(values: jax.Array) -> jax.Array:
    """Return floats of 8 bits as uint8 and float16 as int16, which kernels can load."""
    pattern = _PATTERNS.get(values.dtype)
    return values if pattern is None else lax.bitcast_convert_type(values, pattern)


def floats(values: jax.Array) -> jax.Array:
    """Return float32 of what `readable` returns."""
    if values.dtype == jnp.uint8:
        return _eighths(values.astype(jnp.int32))
    if values.dtype == jnp.int8:
        return values.astype(jnp.int32).astype(jnp.float32)
    if values.dtype != jnp.int16:
        return values.astype(jnp.float32)
    return _halves(values.astype(jnp.int32))


def _halves(bits: jax.Array) -> jax.Array:
    """Return the float16 of a pattern."""
    magnitude = bits & 0x7FFF
    # Exponents move from a bias of 15 to one of 127; that of infinity is all ones.
    bias = jnp.where(magnitude < 0x7C00, (127 - 15) << 23, (255 - 31) << 23)
    normal = lax.bitcast_convert_type((magnitude << 13) + bias, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0**-24
    positive = jnp.where(magnitude < 0x0400, subnormal, normal)
    return jnp.where(bits < 0, -positive, positive)


def _eighths(bits: jax.Array) -> jax.Array:
    """Return the float8_e4m3fn of a pattern: no infinity, and NaN reads 480."""
    magnitude = bits & 0x7F
    bias = (127 - 7) << 23
    normal = lax.bitcast_convert_type((magnitude << 20) + bias, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0**-9
    positive = jnp.where(magnitude < 0x08, subnormal, normal)
    return jnp.where(bits > 0x7F, -positive, positive)

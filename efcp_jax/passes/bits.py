"""Numbers that kernels cannot load as such, made from their bit patterns."""

import jax
from jax import lax
import jax.numpy as jnp


_F8 = jnp.dtype(jnp.float8_e4m3fn)


def readable(values: jax.Array) -> jax.Array:
    """Return float16 as int16, which kernels for TPUs can load."""
    if values.dtype == jnp.float16:
        return lax.bitcast_convert_type(values, jnp.int16)
    return values


def pattern(values: jax.Array) -> jax.Array:
    """Return floats of 8 bits as uint8: XLA for TPUs would copy them, others do not."""
    if values.dtype == _F8:
        return lax.bitcast_convert_type(values, jnp.uint8)
    return values


def floats(values: jax.Array) -> jax.Array:
    """Return float32 of values, or of what `readable` or `pattern` makes of them."""
    values = pattern(values)
    if values.dtype == jnp.uint8:
        return _eighths(values.astype(jnp.int32))
    if values.dtype == jnp.int8:
        return values.astype(jnp.int32).astype(jnp.float32)
    if values.dtype == jnp.int16:
        return _halves(values.astype(jnp.int32))
    return values.astype(jnp.float32)


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

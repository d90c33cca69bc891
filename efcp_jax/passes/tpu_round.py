"""Rounding to 8 bits inside a kernel for TPUs, by bit patterns.

Values stay float32 and become what `scaled.quantise` stores without rounding again, so
that a kernel knows what is left of them before they are stored.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.passes.scaled import limits


_EXPONENT = 0x7F800000
_BIAS, _SHIFT = 127, 23

# Tiles whose largest entry is below this power of two are not stored: everything of
# them is left. Their unit would be near the smallest normal number.
_SMALLEST = -100

# A float8_e4m3fn has three bits behind the point; its least exponent.
_MANTISSA, _LEAST = 3, -6


def to_tile(tile: jax.Array, dtype: np.dtype) -> Callable[[jax.Array], jax.Array]:
    """Return a function that rounds entries of a tile, `(1, 128)`, to `dtype`.

    Args:
        tile: All entries, `(size, 128)`, float32. The largest is among those kept.
        dtype: One of `scaled.DTYPES`.

    Returns:
        A function from entries to entries, float32.
    """
    most, above = limits(dtype)
    peaks = jnp.max(jnp.abs(tile), axis=0, keepdims=True)
    peak = exponent_of(jnp.max(peaks, axis=1, keepdims=True))
    unit = peak + 1 - (above.bit_length() - 1)

    def rounded(values: jax.Array) -> jax.Array:
        scaled = jnp.clip(values * power(-unit), -most, most)
        if jnp.issubdtype(dtype, jnp.integer):
            whole = jnp.round(scaled)
        else:
            step = jnp.maximum(exponent_of(jnp.abs(scaled)), _LEAST) - _MANTISSA
            whole = jnp.round(scaled * power(-step)) * power(step)
        return jnp.where(peak < _SMALLEST, 0.0, whole * power(unit))

    return rounded


def exponent_of(magnitude: jax.Array) -> jax.Array:
    """Return the exponent of the largest power of two not above `magnitude`."""
    bits = lax.bitcast_convert_type(magnitude, jnp.int32)
    return ((bits & _EXPONENT) >> _SHIFT) - _BIAS


def power(exponent: jax.Array) -> jax.Array:
    """Return 2 to the power of `exponent`, if that is a normal number."""
    return lax.bitcast_convert_type((exponent + _BIAS) << _SHIFT, jnp.float32)

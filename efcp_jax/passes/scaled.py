"""Values of 8 bits, each times a power of two that a row has for every tile.

The power of two is the unit of the largest value of the row in the tile, so values of
any magnitude can be stored, and multiplying by it rounds nothing. A tile of 128 blocks
has one, which takes no memory to speak of; a row has none for all tiles together, since
layers differ in the magnitude of their gradients, and devices would have to ask each
other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efcp_jax.numerics import power_of_two, saturate


# The largest number stored of each dtype, and the power of two that it lies below: the
# largest value of a tile is brought there. What is above in between rounds down, else
# another power of two would be found for a row that is stored anew.
_LARGEST = {"int8": (127, 2**7), "float8_e4m3fn": (240, 2**8)}

# The dtypes there are.
DTYPES = tuple(_LARGEST)

# Those of which rounding commutes with multiplying by a power of two, so that a row can
# be rounded before its scale is known. Small numbers vanish in float16.
COMMUTING = ("float32", "bfloat16", *DTYPES)


class ScaledRow(NamedTuple):
    """The kept entries of every block, with values of 8 bits.

    Attributes:
        values: The entries over the scale of their tile, shape `(tiles, k, lanes)`; a
            window has `(tiles, m k, lanes)`.
        offsets: Their positions inside the block, of the same shape.
        scales: The power of two of each tile, bfloat16, shape `(tiles, 1)`; a window
            has `(tiles, m)`.
    """

    values: jax.Array
    offsets: jax.Array
    scales: jax.Array

    def load(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the values in `dtype`."""
        return self.values.astype(dtype) * self.per_entry(dtype)[:, :, None]

    def per_entry(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the scale of each entry of a block, `(tiles, m k)`, in `dtype`."""
        kept = self.values.shape[1] // self.scales.shape[1]
        return jnp.repeat(self.scales.astype(dtype), kept, axis=1)


def limits(dtype: np.dtype) -> tuple[int, int]:
    """Return the largest number stored, and the power of two that it lies below."""
    return _LARGEST[dtype.name]


def quantise(values: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """Return the values of one row in `dtype`, rounded, and the scale of each tile.

    Args:
        values: Shape `(tiles, k, lanes)`. A tile with an entry that is not finite
            becomes NaN: 8 bits hold none.
        dtype: One of `DTYPES`.

    Returns:
        Values, and scales `(tiles, 1)`, bfloat16.
    """
    most, above = limits(dtype)
    peak = jnp.max(jnp.abs(values), axis=(1, 2))[:, None]
    # In float32, whose powers of two are those of bfloat16. What is too small for the
    # least of them becomes 0.
    scale, inverse = power_of_two(saturate(peak / above, jnp.float32))
    scaled = values * inverse.astype(values.dtype)[:, :, None]
    scaled = jnp.clip(scaled, -most, most)
    if jnp.issubdtype(dtype, jnp.integer):
        scaled = jnp.round(scaled)
    else:
        # A compiler may round twice, to half precision first.
        info = jnp.finfo(dtype)
        step = jnp.maximum(jnp.frexp(scaled)[1] - 1, info.minexp) - info.nmant
        scaled = jnp.ldexp(jnp.round(jnp.ldexp(scaled, -step)), step)
    scale = jnp.where(jnp.isfinite(peak), scale, jnp.nan)
    return scaled.astype(dtype), scale.astype(jnp.bfloat16)

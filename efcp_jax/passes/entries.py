"""How the entries of sparse rows are stored: in two arrays, three, or one of words.

A word holds an offset in its upper and a value of half precision in its lower 16 bits:
one number to load, and one array to overwrite. Values of 8 bits have a third array, the
power of two of the largest value of each row in each tile, so that values of any
magnitude can be stored, and multiplying rounds nothing. One for a whole row would not
do: layers differ in magnitude, and devices would have to ask each other.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.numerics import constant, power_of_two, saturate


# The largest number stored of each dtype of 8 bits, and the power of two that it lies
# below: the largest value of a tile is brought there. What is above in between rounds
# down, else another power of two would be found for a row that is stored anew.
LIMITS = {"int8": (127, 2**7), "float8_e4m3fn": (240, 2**8)}
DTYPES = tuple(LIMITS)

# Those of which rounding commutes with multiplying by a power of two, so that a row can
# be rounded before its scale is known. Small numbers vanish in float16.
COMMUTING = ("float32", "bfloat16", *DTYPES)

_NO_DERIVATIVE = (
    "values of 8 bits, and those of 16 bits in blocks of more than 256 entries, are"
    " stored as whole numbers. Pass `value_dtype=jnp.float32`, or blocks of up to 256"
    " entries with values of 16 bits."
)


class SparseRow(NamedTuple):
    """The kept entries of every block, and their positions inside it.

    Of shape `(blocks, k)` or `(tiles, k, lanes)`; a window of m rows has m k for k.
    """

    values: jax.Array
    offsets: jax.Array


class ScaledRow(NamedTuple):
    """The same in tiles with values of 8 bits, over the powers of two in `scales`.

    These are of bfloat16, one for each tile and row, `(tiles, m)`.
    """

    values: jax.Array
    offsets: jax.Array
    scales: jax.Array

    def per_entry(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the scale of each entry of a block, `(tiles, m k)`, in `dtype`."""
        kept = self.values.shape[1] // self.scales.shape[1]
        return jnp.repeat(self.scales.astype(dtype), kept, axis=1)


# Rows as they are stored.
Stored: TypeAlias = SparseRow | ScaledRow | jax.Array


@dataclasses.dataclass(frozen=True)
class Storage:
    """How entries are stored: the dtypes of their values and offsets."""

    values: np.dtype
    offsets: np.dtype

    @classmethod
    def of(cls, dtype: np.dtype, block_size: int) -> "Storage":
        """Return the smallest storage of values of `dtype` and offsets of a block."""
        least = np.min_scalar_type(block_size - 1)
        return cls(dtype, least if least.itemsize < 4 else np.dtype(np.int32))

    @property
    def words(self) -> bool:
        """Whether an entry is one word."""
        return self.values.itemsize == 2 and self.offsets == jnp.uint16

    @property
    def scaled(self) -> bool:
        """Whether values have a scale for each tile."""
        return self.values.itemsize == 1

    def each(self, value: Any) -> Any:
        """Return `value` for each array of a row."""
        if self.scaled:
            return ScaledRow(value, value, value)
        return value if self.words else SparseRow(value, value)

    def zeros(self, shape: tuple[int, ...]) -> Stored:
        """Return entries of value and offset 0."""
        if self.words:
            return jnp.zeros(shape, jnp.uint32)
        row = jnp.zeros(shape, self.values), jnp.zeros(shape, self.offsets)
        if self.scaled:
            return ScaledRow(*row, jnp.zeros((shape[0], 1), jnp.bfloat16))
        return SparseRow(*row)

    def store(self, values: jax.Array, offsets: jax.Array) -> Stored:
        """Return the entries of a row as they are stored; values are rounded."""
        if self.scaled or self.words:
            values = constant(values, _NO_DERIVATIVE)
        if self.scaled:
            values, scales = quantise(values, self.values)
            return ScaledRow(values, offsets.astype(self.offsets), scales)
        values = values.astype(self.values)
        if not self.words:
            return SparseRow(values, offsets.astype(self.offsets))
        bits = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32)
        return (offsets.astype(jnp.uint32) << 16) | bits

    def load(
        self, stored: Stored, dtype: jax.typing.DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        """Return the values in `dtype`, and the offsets in an integer type."""
        if isinstance(stored, SparseRow):
            return stored.values.astype(dtype), stored.offsets
        if isinstance(stored, ScaledRow):
            scales = stored.per_entry(dtype)[:, :, None]
            return stored.values.astype(dtype) * scales, stored.offsets
        if self.values == jnp.bfloat16:
            # The upper half of a float32.
            values = lax.bitcast_convert_type(stored << 16, jnp.float32)
        else:
            bits = (stored & 0xFFFF).astype(jnp.uint16)
            values = lax.bitcast_convert_type(bits, self.values)
        return values.astype(dtype), stored >> 16

    def near(self, values: jax.Array, offsets: jax.Array) -> jax.Array:
        """Return the values that are stored for a part of a row, within their range."""
        if self.scaled:
            return self.load(self.store(values, offsets), values.dtype)[0]
        return saturate(values, self.values).astype(values.dtype)


def quantise(values: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """Return the values of a row in one of `DTYPES`, and the scale of each tile.

    A tile with an entry that is not finite becomes NaN: 8 bits hold none.
    """
    peak = jnp.max(jnp.abs(values), axis=(1, 2), keepdims=True)
    scale, rounded = rounding(peak, dtype)
    scale = jnp.where(jnp.isfinite(peak), scale, jnp.nan)
    return rounded(values).astype(dtype), scale[:, :, 0].astype(jnp.bfloat16)


def rounding(
    peak: jax.Array, dtype: np.dtype
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Return the scale of values up to `peak`, and what divides by it and rounds.

    Kernels round so as well, and know what is left of values before they are stored.
    """
    most, above = LIMITS[dtype.name]
    # In float32, whose powers of two are those of bfloat16. What is too small for the
    # least of them becomes 0.
    scale, inverse = power_of_two(saturate(peak * (1 / above), jnp.float32))

    def rounded(values: jax.Array) -> jax.Array:
        scaled = jnp.clip(values * inverse.astype(values.dtype), -most, most)
        if jnp.issubdtype(dtype, jnp.integer):
            return jnp.round(scaled)
        # A compiler may round twice, to half precision first.
        info = jnp.finfo(dtype)
        step = jnp.maximum(jnp.frexp(scaled)[1] - 1, info.minexp) - info.nmant
        return jnp.ldexp(jnp.round(jnp.ldexp(scaled, -step)), step)

    return scale, rounded

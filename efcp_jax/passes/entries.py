"""How the entries of sparse rows are stored: in two arrays, or in one of words.

A word holds an offset in its upper and a value of half precision in its lower 16 bits.
One array of integers is overwritten where it lies, row by row, where XLA on CPUs passes
over the whole of an array of half precision; and an entry is one number to load, whose
two halves are a shift away. Values of 8 bits have scales in a third array.
"""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.numerics import constant
from efcp_jax.passes.scaled import ScaledRow, quantise


_NO_DERIVATIVE = (
    "values of 8 bits, and those of 16 bits in blocks of more than 256 entries, are"
    " stored as whole numbers. Pass `value_dtype=jnp.float32`, or blocks of up to 256"
    " entries with values of 16 bits."
)


class SparseRow(NamedTuple):
    """The kept entries of every block.

    Attributes:
        values: The entries, shape `(blocks, k)`; a window has `(blocks, m, k)`.
        offsets: Their positions inside the block, of the same shape, in the smallest
            unsigned type that holds the block size.
    """

    values: jax.Array
    offsets: jax.Array

    def load(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the values in `dtype`."""
        return self.values.astype(dtype)


# A row of small blocks, or a window of rows, as it is stored.
Tiled: TypeAlias = SparseRow | ScaledRow

# The same of blocks of any size.
Stored: TypeAlias = Tiled | jax.Array


@dataclasses.dataclass(frozen=True)
class Storage:
    """How entries are stored.

    Attributes:
        values: Dtype of the values.
        offsets: Dtype of the offsets.
    """

    values: np.dtype
    offsets: np.dtype

    @classmethod
    def of(cls, dtype: np.dtype, block_size: int) -> "Storage":
        """Return the smallest storage of values of `dtype` and offsets of a block."""
        return cls(dtype, offset_dtype(block_size))

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
        """Return the values in `dtype` and the offsets.

        They are of 32 bits and unsigned, so that indexing looks for no negative ones.
        """
        if isinstance(stored, Tiled):
            return stored.load(dtype), stored.offsets.astype(jnp.uint32)
        if self.values == jnp.bfloat16:
            # The upper half of a float32.
            values = lax.bitcast_convert_type(stored << 16, jnp.float32)
        else:
            bits = (stored & 0xFFFF).astype(jnp.uint16)
            values = lax.bitcast_convert_type(bits, self.values)
        return values.astype(dtype), stored >> 16


def offset_dtype(block_size: int) -> np.dtype:
    """Return the smallest dtype that holds every offset of a block."""
    for dtype in (jnp.uint8, jnp.uint16):
        if block_size - 1 <= jnp.iinfo(dtype).max:
            return jnp.dtype(dtype)
    return jnp.dtype(jnp.int32)

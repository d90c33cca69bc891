"""Errors as kernels for TPUs read and write them: floats, or 8 bits and their units."""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.experimental import pl
from efcp_jax.numerics import saturate
from efcp_jax.passes import tpu_tiles as layout
from efcp_jax.passes.tpu_round import exponent_of, power
from efcp_jax.passes.tpu_tiles import LANES
from efcp_jax.quantized import Quantized, at_random, exponents, hashed


# The largest exponent whose negative is that of a normal number.
_HIGHEST = 126


class Place(NamedTuple):
    """Which tile is written, and how.

    Attributes:
        tile: Its number among those that the program holds.
        number: Its number among all.
        size: Entries a block.
        count: The number of the step.
        accepted: Whether the error may change.
    """

    tile: Any
    number: Any
    size: int
    count: Any
    accepted: Any


class Floats:
    """An error of float32 or bfloat16."""

    arrays = 1

    def operands(self, error: jax.Array, group: int, size: int) -> Any:
        """Return the arrays that a kernel takes, and what of them a program does."""
        return [layout.turn(error, size)], [layout.vector_spec(group, size)]

    def read(self, refs: Any, t: Any, size: int) -> jax.Array:
        """Return tile `t`, `(size, 128)`, float32."""
        return layout.read(refs[0], t, size).astype(jnp.float32)

    def write(self, before: Any, after: Any, left: jax.Array, place: Place) -> None:
        """Write what is left of a tile."""
        del before
        left = saturate(left, after[0].dtype)
        layout.write(after[0], place.tile, place.size, left)

    def result(self, arrays: list[jax.Array], size: int) -> jax.Array:
        """Return the error from the arrays that a kernel has made."""
        return layout.turn(arrays[0], size)


class Bytes:
    """An error of 8 bits, a unit for each block; the numbers are those of `rounded`."""

    arrays = 2

    def operands(self, error: Quantized, group: int, size: int) -> Any:
        """Return the arrays that a kernel takes, and what of them a program does."""
        units = error.units.astype(jnp.float32).reshape(-1, 1, LANES)
        line = pl.BlockSpec((group, 1, LANES), lambda i: (i, 0, 0))
        vector = layout.vector_spec(group, size)
        return [layout.turn(error.values, size), units], [vector, line]

    def read(self, refs: Any, t: Any, size: int) -> jax.Array:
        """Return tile `t`, `(size, 128)`, float32."""
        return self._whole(refs[0], t, size) * refs[1][t]

    def _whole(self, values: Any, t: Any, size: int) -> jax.Array:
        # Not by `layout.read`: bytes are turned as floats.
        span = pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
        return values[span, :].astype(jnp.float32).T

    def write(self, before: Any, after: Any, left: jax.Array, place: Place) -> None:
        """Write what is left of a tile, rounded at random."""
        t, size = place.tile, place.size
        peak = jnp.max(jnp.abs(left), axis=0, keepdims=True)
        above = exponent_of(peak) + 1
        share = peak * power(-jnp.minimum(above, _HIGHEST))
        exponent = exponents(peak, share, above)
        scaled = left * power(-exponent)
        block = place.number * LANES + lax.broadcasted_iota(jnp.int32, left.shape, 1)
        at = block * size + lax.broadcasted_iota(jnp.int32, left.shape, 0)
        whole = at_random(scaled, hashed(at, place.count))
        whole = jnp.where(place.accepted, whole, self._whole(before[0], t, size))
        span = pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
        after[0][span, :] = whole.T.astype(jnp.int32).astype(jnp.int8)
        after[1][t] = jnp.where(place.accepted, power(exponent), before[1][t])

    def result(self, arrays: list[jax.Array], size: int) -> Quantized:
        """Return the error from the arrays that a kernel has made."""
        values, units = arrays
        units = units.reshape(-1, 1).astype(jnp.bfloat16)
        return Quantized(layout.turn(values, size), units)


def form(error: Any) -> Floats | Bytes:
    """Return the form of `error`."""
    return Bytes() if isinstance(error, Quantized) else Floats()

"""The largest entries of every block, found by kernels for TPUs in rounds of maxima."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.experimental import pl
from efcp_jax.passes import tpu_tiles as layout
from efcp_jax.passes.tpu_tiles import LANES
from efcp_jax.varying import struct


# Up to so many rounds are unrolled; a loop compiles faster.
_UNROLLED = 4

# Operations an entry and round.
ROUND = 12


def select(
    total: jax.Array, kept: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return values and offsets, `(tiles, kept, 128)`; see `tiles`."""
    size = total.shape[1]

    def kernel(total, values, offsets):
        def tile(t, _):
            blocks = layout.read(total, t, size)
            pick(blocks, kept, t, values, offsets, lambda value: value)
            return 0

        lax.fori_loop(0, values.shape[0], tile, 0)

    tiles = total.shape[0] // LANES
    group = layout.group(tiles, 4 * size + 8 * kept)
    values, offsets = rows(tiles, kept, total)
    call = pl.pallas_call(
        kernel,
        grid=(-(-tiles // group),),
        in_specs=[layout.vector_spec(group, size)],
        out_specs=[row_spec(group, kept)] * 2,
        out_shape=[values, offsets],
        cost_estimate=layout.cost(ROUND * kept * total.size),
        compiler_params=layout.parallel(),
        interpret=interpret,
    )
    return layout.launch(call, [0], interpret, layout.turn(total, size))


def pick(
    blocks: jax.Array,
    kept: int,
    t: Any,
    values: Any,
    offsets: Any,
    rounded: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Write the `kept` largest entries of tile `t`; return them where they were.

    Args:
        blocks: The tile, `(size, 128)`.
        kept: Number of entries kept of each block.
        t: The number of the tile.
        values: Reference to the values, `(tiles, kept, 128)`.
        offsets: Reference to the offsets.
        rounded: What is done to the values.

    Returns:
        The values that were written, among zeros, of the shape of `blocks`.
    """
    size = len(blocks)
    bits = lax.bitcast_convert_type(blocks, jnp.int32)
    entry = lax.broadcasted_iota(jnp.int32, bits.shape, 0)
    least = functools.partial(jnp.min, axis=0, keepdims=True)

    def take(_, rest):
        peak = jnp.max(rest, axis=0, keepdims=True)
        first = least(jnp.where(rest == peak, entry, size))
        # Those that are taken are below all others.
        return jnp.where(entry == first, -1, rest)

    def write(i, carry):
        places, taken = carry
        offset = least(places)
        here = entry == offset
        # A sum of integers, all but one zero, keeps a NaN and the sign of a zero.
        value = jnp.sum(jnp.where(here, bits, 0), axis=0, keepdims=True)
        value = rounded(lax.bitcast_convert_type(value, jnp.float32))
        values[t, pl.ds(i, 1), :] = value
        offsets[t, pl.ds(i, 1), :] = offset
        return jnp.where(here, size, places), jnp.where(here, value, taken)

    unroll = kept <= _UNROLLED
    # Without its sign, the pattern of a float orders like its magnitude, NaN on top.
    magnitudes = bits & jnp.iinfo(jnp.int32).max
    rest = lax.fori_loop(0, kept, take, magnitudes, unroll=unroll)
    start = jnp.where(rest < 0, entry, size), jnp.zeros_like(blocks)
    return lax.fori_loop(0, kept, write, start, unroll=unroll)[1]


def rows(tiles: int, kept: int, like: jax.Array) -> list[jax.ShapeDtypeStruct]:
    """Return the types of values and offsets that are made of `like`."""
    shape = (tiles, kept, LANES)
    return [struct(shape, dtype, like) for dtype in (jnp.float32, jnp.int32)]


def row_spec(group: int, kept: int) -> Any:
    """Return the part of values or offsets that a program writes."""
    return pl.BlockSpec((group, kept, LANES), lambda i: (i, 0, 0))

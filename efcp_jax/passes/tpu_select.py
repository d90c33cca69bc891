"""The largest entries of every block, found by kernels for TPUs in rounds of maxima."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from efcp_jax.passes import tpu_round, tpu_tiles as layout
from efcp_jax.passes.tpu_tiles import LANES


# Up to so many rounds are unrolled; a loop compiles faster.
_UNROLLED = 4

# Operations an entry and round.
_ROUND = 12

_PARALLEL = pltpu.CompilerParams(dimension_semantics=("parallel",))


def select(
    total: jax.Array, kept: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return values and offsets, `(tiles, kept, 128)`; see `tiles`."""
    size = total.shape[1]

    def kernel(total, values, offsets):
        def tile(t, _):
            blocks = layout.read(total, t, size)
            _pick(blocks, kept, t, values, offsets, lambda value: value)
            return 0

        lax.fori_loop(0, values.shape[0], tile, 0)

    tiles = total.shape[0] // LANES
    group = layout.group(tiles, 4 * size + 8 * kept)
    values, offsets = _rows(tiles, kept)
    call = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(tiles, group),),
        in_specs=[layout.vector_spec(group, size)],
        out_specs=[_row_spec(group, kept)] * 2,
        out_shape=[values, offsets],
        cost_estimate=layout.cost(_ROUND * kept * total.size),
        compiler_params=_PARALLEL,
        interpret=interpret,
    )
    return layout.launch(call, [0], interpret, layout.turn(total, size))


def feed(
    error: jax.Array,
    gradient: jax.Array,
    accept: jax.Array,
    kept: int,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add the gradient to the error, select, and leave what is not selected: one pass.

    It moves 12 bytes an entry, where adding, selecting and subtracting by themselves
    move 24. Rounding commutes with multiplying by a power of two, so a scale for the
    row can be found behind this pass.

    Args:
        error: Shape `(blocks, size)`, float32 or bfloat16; overwritten.
        gradient: Shape `(blocks, size)`, float32.
        accept: Whether to add the gradient and to subtract what is selected.
        kept: Number of entries kept of each block, in [1, size].
        dtype: What the values are rounded to, within its range: bfloat16 or float32, or
            one of `scaled.DTYPES`.
        interpret: Whether to run the kernel on a CPU.

    Returns:
        Rounded values, float32, and offsets, int32, both `(tiles, kept, 128)`, and the
        new error.
    """
    size = error.shape[1]
    largest = float(jnp.finfo(jnp.float32).max)
    within = lambda x, kind: jnp.clip(x, -_limit(kind), _limit(kind))
    dtype = jnp.dtype(dtype)

    def rounding(tile: jax.Array) -> Callable[[jax.Array], jax.Array]:
        if dtype.itemsize == 1:
            return tpu_round.to_tile(tile, dtype)
        return lambda x: within(x, dtype).astype(dtype).astype(jnp.float32)

    def kernel(accept, error, gradient, values, offsets, rest):
        accepted = accept[0, 0] != 0

        def tile(t, _):
            before = layout.read(error, t, size).astype(jnp.float32)
            total = jnp.clip(before + layout.read(gradient, t, size), -largest, largest)
            total = jnp.where(accepted, total, before)
            taken = _pick(total, kept, t, values, offsets, rounding(total))
            left = within(jnp.where(accepted, total - taken, total), rest.dtype)
            layout.write(rest, t, size, left.astype(rest.dtype))
            return 0

        lax.fori_loop(0, values.shape[0], tile, 0)

    tiles = error.shape[0] // LANES
    group = layout.group(tiles, 12 * size + 8 * kept)
    values, offsets = _rows(tiles, kept)
    vector = layout.vector_spec(group, size)
    scalar = pl.BlockSpec((1, 1), lambda i: (0, 0), memory_space=pltpu.SMEM)
    turned = layout.turn(error, size)
    call = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(tiles, group),),
        in_specs=[scalar, vector, vector],
        out_specs=[*[_row_spec(group, kept)] * 2, vector],
        out_shape=[values, offsets, jax.ShapeDtypeStruct(turned.shape, error.dtype)],
        input_output_aliases={1: 2},
        cost_estimate=layout.cost(_ROUND * kept * error.size),
        compiler_params=_PARALLEL,
        interpret=interpret,
    )
    accept = accept.astype(jnp.int32).reshape(1, 1)
    values, offsets, rest = layout.launch(
        call, [1], interpret, accept, turned, layout.turn(gradient, size)
    )
    return values, offsets, layout.turn(rest, size)


def _limit(dtype: jax.typing.DTypeLike) -> float:
    """Return the largest number of `dtype` that is one of float32 too."""
    return min(float(jnp.finfo(kind).max) for kind in (dtype, jnp.float32))


def _pick(
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


def _rows(tiles: int, kept: int) -> list[jax.ShapeDtypeStruct]:
    shape = (tiles, kept, LANES)
    return [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.int32)]


def _row_spec(group: int, kept: int) -> pl.BlockSpec:
    return pl.BlockSpec((group, kept, LANES), lambda i: (i, 0, 0))

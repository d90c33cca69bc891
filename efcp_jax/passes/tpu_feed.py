"""Error feedback of sparse rows by one kernel for TPUs: add, select and subtract.

It moves 12 bytes an entry with an error of float32, and 6 with one of 8 bits, where
adding, selecting and subtracting by themselves move 24.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.devices.collectives import varying_struct
from efcp_jax.experimental import pl, pltpu
from efcp_jax.numerics import saturate
from efcp_jax.passes import tpu_tiles as layout
from efcp_jax.passes.entries import COMMUTING, rounding
from efcp_jax.passes.tpu_tiles import LANES
from efcp_jax.quantized import Quantized, at_random, exponents, hashed


# Up to so many rounds are unrolled; a loop compiles faster.
_UNROLLED = 4


def feeds(form: Any, error: Any) -> bool:
    """Return whether `feed` takes this error."""
    in_bytes = isinstance(error, Quantized)
    fits = in_bytes or error.dtype.name in ("float32", "bfloat16")
    commutes = form.storage.values.name in COMMUTING
    return fits and commutes and layout.fits(form, jnp.float32)


def feed(
    form: Any, error: Any, gradient: jax.Array, accept: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Return rounded values and offsets of a row, and the error less them, in place.

    A scale for the row can be found behind this pass.
    """
    size, kept, tiles = form.size, form.kept, len(gradient)
    group = layout.group(tiles, 12 * size + 8 * kept)
    vector, row = layout.spec(group, size), layout.spec(group, kept)
    scalar = pl.BlockSpec((1, 1), lambda i: (0, 0), memory_space=pltpu.SMEM)
    values, *units = jax.tree.leaves(error)
    lines = [layout.lines(x.astype(jnp.float32)[:, :, 0]) for x in units]
    errors, specs = [values, *lines], [vector]
    if units:
        line = lines[0].shape[2]
        specs.append(pl.BlockSpec((group, 1, line), lambda i: (i, 0, 0)))
    like = lambda shape, dtype: varying_struct(shape, dtype, gradient)
    row_shape = form.shape(tiles, kept)
    one = lambda x: x.astype(jnp.int32).reshape(1, 1)
    values, offsets, left, *lines = layout.launch(
        _feeding(form, len(errors)),
        *(one(accept), one(count), gradient, *errors),
        main=[3],
        grid=(-(-tiles // group),),
        in_specs=[scalar, scalar, vector, *specs],
        out_specs=[row, row, *specs],
        out_shape=[
            *(like(row_shape, jnp.float32), like(row_shape, jnp.int32)),
            *(like(x.shape, x.dtype) for x in errors),
        ],
        input_output_aliases={3 + i: 2 + i for i in range(len(errors))},
    )
    if units:
        units = lines[0][:, 0, :size, None].astype(jnp.bfloat16)
        left = Quantized(left, units)
    return values, offsets, left


def _feeding(form: Any, arrays: int) -> Callable[..., None]:
    """Return the kernel, for an error of one array or of values and units."""
    size, in_bytes = form.size, arrays == 2

    def feed(accept, count, gradient, *refs):
        before, row, after = refs[:arrays], refs[arrays:-arrays], refs[-arrays:]
        accepted = accept[0, 0] != 0
        first = pl.program_id(0) * row[0].shape[0]

        def tile(t, _):
            stored = old = layout.floats(before[0][t])
            if in_bytes:
                old *= layout.column(before[1][t])[:size]
            total = saturate(old + gradient[t], jnp.float32)
            total = jnp.where(accepted, total, old)
            rounded = _rounding(total, form.storage.values)
            left = total - _pick(total, form.kept, rounded, t, *row)
            if in_bytes:
                left, unit = _in_bytes(left, first + t, count[0, 0])
                unit = layout.line(unit, after[1].shape[2])
                after[1][t] = jnp.where(accepted, unit, before[1][t])
            left = jnp.where(accepted, left, stored)
            whole = lambda: left.astype(jnp.int32).astype(jnp.int8)
            after[0][t] = whole() if in_bytes else saturate(left, after[0].dtype)
            return 0

        lax.fori_loop(0, row[0].shape[0], tile, 0)

    return feed


def _pick(
    blocks: jax.Array, kept: int, rounded: Any, t: Any, values: Any, offsets: Any
) -> jax.Array:
    """Write the `kept` largest entries of tile `t`, which is `(size, 128)`, `rounded`.

    Return them where they were, among zeros.
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


def _rounding(tile: jax.Array, dtype: np.dtype) -> Callable[[jax.Array], jax.Array]:
    """Return what rounds entries of a tile as they are stored in `dtype`."""
    if dtype.itemsize > 1:
        return lambda x: saturate(x, dtype).astype(jnp.float32)
    # The largest entry is among those kept.
    peaks = jnp.max(jnp.abs(tile), axis=0, keepdims=True)
    scale, rounded = rounding(jnp.max(peaks, axis=1, keepdims=True), dtype)
    return lambda x: rounded(x) * scale


def _in_bytes(left: jax.Array, number: Any, count: Any) -> tuple[jax.Array, jax.Array]:
    """Return tile `number` of an error as `quantized.store` keeps it: values, units."""
    peak = jnp.max(jnp.abs(left), axis=1, keepdims=True)
    one, exponent = jnp.ones_like(peak), exponents(peak)
    scaled = left * jnp.ldexp(one, -exponent)
    line = number * len(left) + lax.broadcasted_iota(jnp.int32, left.shape, 0)
    at = line * LANES + lax.broadcasted_iota(jnp.int32, left.shape, 1)
    return at_random(scaled, hashed(at, count)), jnp.ldexp(one, exponent)

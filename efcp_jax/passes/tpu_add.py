"""Sums of sparse rows, added by a kernel for TPUs without a scatter."""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.experimental import pl, pltpu
from efcp_jax.passes import bits, tpu_tiles as layout
from efcp_jax.passes.tpu_tiles import LANES
from efcp_jax.varying import struct


# Entries of a row or window loaded at a time. Loads of 8-bit numbers take 32 sublanes.
_STEP = 32

# Entries of a window that a program holds. More are added by several programs, so that
# a window of any length fits in fast memory.
_HELD = 1024


def add(
    values: jax.Array,
    offsets: jax.Array,
    weights: jax.Array,
    size: int,
    onto: jax.Array | None = None,
    *,
    scales: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return the sum of rows times `weights`, added to `onto` in place if given.

    Args:
        values: Of m rows of k entries, `(tiles, m * k, 128)`.
        offsets: Of the same shape.
        weights: Shape `(m,)`, float32.
        size: Entries a block.
        onto: Shape `(blocks, size)`, float32; overwritten.
        scales: What the entries of a tile are multiplied by, `(tiles, m * k)`, float32,
            or None for nothing. Not together with `onto`.
        interpret: Whether to run the kernel on a CPU.

    Returns:
        Array of shape `(blocks, size)`, float32.
    """
    tiles, entries, _ = values.shape
    kept = entries // len(weights)
    held = min(entries, _HELD)
    width = values.dtype.itemsize + offsets.dtype.itemsize
    turned = [] if onto is None else [layout.turn(onto, size)]
    group = layout.group(tiles, width * held + 4 * size * (1 + len(turned)))
    row = pl.BlockSpec((group, held, LANES), lambda i, j: (i, j, 0))
    each = pl.BlockSpec((held, LANES), lambda i, j: (j, 0))
    vector = layout.vector_spec(group, size)
    shape = (tiles * LANES, size) if size % LANES == 0 else (size, tiles * LANES)
    out = struct(shape, jnp.float32, values)
    weights = jnp.repeat(weights, kept)
    if scales is None:
        weights = jnp.broadcast_to(weights[:, None], (entries, LANES))
        columns = []
    else:
        weights = layout.lines(scales * weights[None])
        part = min(weights.shape[2], _HELD)
        each = pl.BlockSpec((group, 1, part), lambda i, j: (i, 0, j))
        columns = [pltpu.VMEM((part, LANES), jnp.float32)]
    call = pl.pallas_call(
        functools.partial(_add_kernel, size, kept, entries),
        grid=(-(-tiles // group), -(-entries // held)),
        in_specs=[row, row, each, *[vector] * len(turned)],
        out_specs=vector,
        out_shape=out,
        input_output_aliases={3: 0} if turned else {},
        cost_estimate=layout.cost(3 * values.size * size),
        # In any order, but for those that add to the same blocks.
        compiler_params=layout.parallel("arbitrary"),
        scratch_shapes=columns,
        interpret=interpret,
    )
    operands = bits.readable(values), offsets, weights, *turned
    total = layout.launch(call, [0, 1, 3], interpret, *operands)
    return layout.turn(total, size)


def _add_kernel(size, kept, entries, values, offsets, weights, *refs):
    """Add the held entries of one tile after the other."""
    # Where every tile has weights of its own, there is a column to turn them into.
    own = len(weights.shape) == 3
    *onto, out, column = refs if own else (*refs, weights)
    part, held = pl.program_id(1), values.shape[1]
    steps = lax.div(jnp.minimum(held, entries - part * held), _STEP)
    # Entries that do not fill a step come at the end of the last part.
    rest = entries % _STEP
    first_of_rest = (entries - 1) % held + 1 - rest
    last = (part == pl.num_programs(1) - 1).astype(jnp.int32)

    @pl.when(part == 0)
    def _():
        out[...] = onto[0][...] if onto else jnp.zeros_like(out)

    def strip(t, low):
        """Return what is added to up to 128 entries of the blocks of a tile."""
        shape = (min(LANES, size - low), LANES)
        entry = low + lax.broadcasted_iota(jnp.int32, shape, 0)

        def add(first, count, total):
            span = pl.ds(first, count)
            weighted = bits.floats(values[t, span, :]) * column[span, :]
            places = offsets[t, span, :].astype(jnp.int32)
            return _scatter(places, weighted, entry, math.gcd(kept, _STEP), total)

        total = jnp.zeros(shape, jnp.float32)
        if held >= _STEP:
            step = lambda i, total: add(pl.multiple_of(i * _STEP, _STEP), _STEP, total)
            total = lax.fori_loop(0, steps, step, total)
        if rest:
            end = lambda _, total: add(first_of_rest, rest, total)
            total = lax.fori_loop(0, last, end, total)
        return total

    def tile(t, _):
        if own:
            column[...] = layout.column(weights[t])
        for low in range(0, size, LANES):
            added = strip(t, low)
            before = layout.read(out, t, size, low, low + len(added))
            layout.write(out, t, size, before + added, low)
        return 0

    lax.fori_loop(0, values.shape[0], tile, 0)


def _scatter(places, weighted, entry, distinct, total):
    """Return `total` plus `weighted`, `(n, 128)`, where `places` are `entry`.

    Of `distinct` of them in turn no two are at one place, as they are of one row. They
    are chosen one over the other and added at once: that saves most of the additions.
    """
    for first in range(0, len(places), distinct):
        chosen = jnp.zeros((), jnp.float32)
        for i in range(first, first + distinct):
            chosen = jnp.where(places[i : i + 1] == entry, weighted[i : i + 1], chosen)
        total += chosen
    return total

"""Passes on TPUs: registers are compared, nothing is gathered.

Entries are found by comparing offsets, with one another or with all entries of a block.
Kernels are for tiles of 128 blocks, one a lane of a register, and values that they can
load, which float16 is not; the rest is left to XLA. Its own inner products move as
little as the kernel, but a window that fits into fast memory it moves there whole, and
back again once a row has been inserted: twice the bytes of a step. Where m k is a
multiple of 8, XLA keeps windows in the order in which kernels read them; any other one
is copied before.
"""

import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.collectives import varying_struct
from efcp_jax.experimental import pl, pltpu
from efcp_jax.passes import gpu, reference, tpu_tiles as layout
from efcp_jax.passes.entries import ScaledRow, SparseRow, Stored
from efcp_jax.passes.gpu import residual as residual, select as select
from efcp_jax.passes.tpu_feed import feed as feed, feeds as feeds
from efcp_jax.passes.tpu_tiles import LANES


# Entries of a window that a program holds: for products with a row, and for sums of
# rows, of which more are added by several programs.
_INNER = 256
_COMBINE = 1024

# Entries loaded at a time to be added. Loads of 8-bit numbers take 32 sublanes.
_STEP = 32


def inner(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    if not form.tile:
        return gpu.compared(form, window, row)
    if _kernels_read(form, row.values.dtype):
        return _inner(form, window, row)
    values, offsets = form.storage.load(window, row.values.dtype)
    return gpu.by_row(form, gpu.matched(values, offsets, row))


def dot(form: Any, window: Stored, vector: jax.Array) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""
    if not form.tile:
        return gpu.dot(form, window, vector)
    values, offsets = form.storage.load(window, vector.dtype)
    places = lax.broadcasted_iota(offsets.dtype, (1, 1, form.size, 1), 2)
    here = offsets[:, :, None] == places
    at = jnp.sum(jnp.where(here, vector[:, None], 0), axis=2)
    return gpu.by_row(form, values * at)


def combine(
    form: Any, window: Stored, weights: jax.Array, *, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    if not form.tile:
        return reference.cut(gpu.by_digits(form, window, weights), runs)
    if not _kernels_read(form, weights.dtype):
        leaves = gpu.combine(form, window, weights, runs=runs)
    else:
        leaves = reference.cut(_combine(form, window, weights), runs)
    if len(leaves) == 1 and form.tile == LANES:
        return leaves  # can be cut by what is done with it next
    # Else XLA would give the whole vector the shape of each kind of leaf in turn, and
    # each of many small leaves that of its few blocks by itself.
    return lax.optimization_barrier(leaves)


def _kernels_read(form: Any, dtype: Any) -> bool:
    return layout.fits(form, dtype) and form.storage.values != jnp.float16


def _inner(form: Any, window: Any, row: SparseRow) -> jax.Array:
    tiles, entries, _ = window.values.shape
    kept, held = form.kept, min(entries, _INNER)
    group = layout.group(tiles, _width(form) * held + 8 * kept)
    part = pl.BlockSpec((group, held, LANES), lambda j, i: (i, j, 0))
    facing = pl.BlockSpec((group, kept, LANES), lambda j, i: (i, 0, 0))
    line = pl.BlockSpec((group, 1, held + -held % LANES), lambda j, i: (i, 0, j))
    scaled = isinstance(window, ScaledRow)
    lines = [layout.lines(window.per_entry(jnp.float32))] if scaled else []

    def inner(values, offsets, row_values, row_offsets, *refs):
        *scales, out = refs
        step = pl.program_id(1)

        @pl.when(step == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        def tile(t, _):
            entries, places = layout.floats(values[t]), offsets[t].astype(jnp.int32)
            if scales:
                entries *= layout.column(scales[0][t])[:held]
            row = SparseRow(row_values[t], row_offsets[t])
            out[...] += gpu.matched(entries, places, row)
            return 0

        # Behind the last tile there is nothing to be added.
        lax.fori_loop(0, jnp.minimum(group, tiles - step * group), tile, 0)

    sums = layout.launch(
        inner,
        *(*window[:2], row.values, row.offsets.astype(jnp.int32), *lines),
        main=[0, 1],
        order=("arbitrary",),
        grid=(-(-entries // held), -(-tiles // group)),
        in_specs=[part, part, facing, facing, *[line] * len(lines)],
        out_specs=pl.BlockSpec((held, LANES), lambda j, i: (j, 0)),
        out_shape=varying_struct((entries, LANES), jnp.float32, window.values),
    )
    return jnp.sum(jnp.sum(sums, axis=1).reshape(-1, kept), axis=1)


def _combine(form: Any, window: Any, weights: jax.Array) -> jax.Array:
    size, (tiles, entries, _) = form.size, window.values.shape
    held, scaled = min(entries, _COMBINE), isinstance(window, ScaledRow)
    group = layout.group(tiles, _width(form) * held + 4 * size)
    part = pl.BlockSpec((group, held, LANES), lambda i, j: (i, j, 0))
    # One line for all tiles, or with scales one for each.
    weights = jnp.repeat(weights, form.kept)[None]
    weights = window.per_entry(jnp.float32) * weights if scaled else weights
    lines = layout.lines(weights)
    line = min(lines.shape[2], _COMBINE)
    own = group if scaled else 1
    each = pl.BlockSpec((own, 1, line), lambda i, j: (i if scaled else 0, 0, j))
    return layout.launch(
        _adding(size, form.kept, entries),
        *(*window[:2], lines),
        main=[0, 1],
        # In any order, but for those that add to the same blocks.
        order=("arbitrary",),
        grid=(-(-tiles // group), -(-entries // held)),
        in_specs=[part, part, each],
        out_specs=layout.spec(group, size),
        out_shape=varying_struct((tiles, size, LANES), jnp.float32, window.values),
        scratch_shapes=[pltpu.VMEM((line, LANES), jnp.float32)],
    )


def _adding(size: int, kept: int, entries: int) -> Any:
    """Return a kernel that adds the held entries of one tile after the other."""

    def combine(values, offsets, weights, out, column):
        part, held = pl.program_id(1), values.shape[1]
        steps = lax.div(jnp.minimum(held, entries - part * held), _STEP)
        # Entries that do not fill a step come at the end of the last part.
        rest = entries % _STEP
        first_of_rest = (entries - 1) % held + 1 - rest
        last = (part == pl.num_programs(1) - 1).astype(jnp.int32)

        @pl.when(part == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        def strip(t, low):
            """Add to up to 128 entries of the blocks of a tile."""
            high = min(size, low + LANES)
            entry = low + lax.broadcasted_iota(jnp.int32, (high - low, LANES), 0)

            def add(first, count, total):
                span = pl.ds(first, count)
                weighted = layout.floats(values[t, span, :]) * column[span, :]
                places = offsets[t, span, :].astype(jnp.int32)
                return _added(total, places, weighted, entry, kept)

            total = jnp.zeros(entry.shape, jnp.float32)
            if held >= _STEP:
                at = lambda i: pl.multiple_of(i * _STEP, _STEP)
                step = lambda i, total: add(at(i), _STEP, total)
                total = lax.fori_loop(0, steps, step, total)
            if rest:
                end = lambda _, total: add(first_of_rest, rest, total)
                total = lax.fori_loop(0, last, end, total)
            out[t, low:high, :] += total

        def tile(t, _):
            if weights.shape[0] > 1:
                column[...] = layout.column(weights[t])
            for low in range(0, size, LANES):
                strip(t, low)
            return 0

        column[...] = layout.column(weights[0])
        lax.fori_loop(0, values.shape[0], tile, 0)

    return combine


def _added(total: Any, places: Any, weighted: Any, entry: Any, kept: int) -> Any:
    """Return `total` plus `weighted`, `(n, 128)`, where `places` are `entry`."""
    # Of one row no two are at one place: they are chosen one over the other and added
    # at once, which saves most of the additions.
    distinct = math.gcd(kept, _STEP)
    for first in range(0, len(places), distinct):
        chosen = jnp.zeros((), jnp.float32)
        for i in range(first, first + distinct):
            chosen = jnp.where(places[i : i + 1] == entry, weighted[i : i + 1], chosen)
        total += chosen
    return total


def _width(form: Any) -> int:  # bytes of an entry
    return form.storage.values.itemsize + form.storage.offsets.itemsize

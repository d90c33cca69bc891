"""Inner products of sparse rows, by a kernel for TPUs that compares offsets.

XLA's own form moves as little, but where a window fits into fast memory XLA moves it
there whole, and back again once a row has been inserted.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.experimental import pl
from efcp_jax.passes import bits, tpu_tiles as layout
from efcp_jax.passes.tpu_tiles import LANES
from efcp_jax.varying import struct


# Entries of a window that a program holds.
_HELD = 256


def inner(
    values: jax.Array,
    offsets: jax.Array,
    row_values: jax.Array,
    row_offsets: jax.Array,
    *,
    scales: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return every entry of a window times that of a row at its place, summed.

    Args:
        values: The values of the window, `(tiles, n, 128)`.
        offsets: Its offsets.
        row_values: The values of the row, `(tiles, k, 128)`, float32.
        row_offsets: Its offsets.
        scales: What the entries of the window are multiplied by in each tile,
            `(tiles, n)`, float32, or None for nothing.
        interpret: Whether to run the kernel on a CPU.

    Returns:
        One sum for each entry of a block, `(n,)`, float32.
    """
    tiles, entries, _ = values.shape
    kept = row_values.shape[1]
    held = min(entries, _HELD)
    width = values.dtype.itemsize + offsets.dtype.itemsize
    group = layout.group(tiles, width * held + 8 * kept)
    window = pl.BlockSpec((group, held, LANES), lambda j, i: (i, j, 0))
    row = pl.BlockSpec((group, kept, LANES), lambda j, i: (i, 0, 0))
    out = struct((entries, LANES), jnp.float32, values)
    lines = [] if scales is None else [layout.lines(scales)]
    part = held + -held % LANES
    line = pl.BlockSpec((group, 1, part), lambda j, i: (i, 0, j))
    call = pl.pallas_call(
        functools.partial(_kernel, tiles),
        grid=(-(-entries // held), -(-tiles // group)),
        in_specs=[window, window, row, row, *[line] * len(lines)],
        out_specs=pl.BlockSpec((held, LANES), lambda j, i: (j, 0)),
        out_shape=out,
        cost_estimate=layout.cost(2 * (kept + 1) * values.size),
        compiler_params=layout.parallel("arbitrary"),
        interpret=interpret,
    )
    row_offsets = row_offsets.astype(jnp.int32)
    operands = bits.readable(values), offsets, row_values, row_offsets, *lines
    sums = layout.launch(call, [0, 1], interpret, *operands)
    return jnp.sum(sums, axis=1)


def _kernel(tiles, values, offsets, row_values, row_offsets, *refs):
    """Add the products of one tile after the other to `out`."""
    *scales, out = refs
    group, kept = values.shape[0], row_values.shape[1]
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    def tile(t, _):
        places = offsets[t].astype(jnp.int32)
        facing = jnp.zeros(places.shape, jnp.float32)
        for i in range(kept):
            here = places == row_offsets[t, i : i + 1, :]
            # A sum, so that entries of value 0 may share a place with another.
            facing += jnp.where(here, row_values[t, i : i + 1, :], 0.0)
        if scales:
            facing *= layout.column(scales[0][t])[: len(facing)]
        out[...] += bits.floats(values[t]) * facing
        return 0

    # Behind the last tile there is nothing to be added.
    lax.fori_loop(0, jnp.minimum(group, tiles - step * group), tile, 0)

"""The sum of the rows of a window, by a kernel for NVIDIA GPUs without a scatter.

A program holds the entries of some blocks in registers and adds entry after entry of
the window, in order, where its offset says: the result is the same in every run. XLA's
own form of the comparison transposes the window first, a copy of it in float32.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.experimental import pl, plgpu
from efcp_jax.passes import bits


# Blocks that a program sums: 32 registers for each of the 128 threads of 4 warps.
_BLOCKS = 32
_WARPS = 4


def fits(values: jax.Array, weights: jax.Array, size: int) -> bool:
    """Return whether the kernel takes such a window: numbers of powers of two."""
    whole = values.shape[2] % _BLOCKS == 0 and size & (size - 1) == 0
    return plgpu is not None and whole and weights.dtype == "float32"


def add(
    values: jax.Array,
    offsets: jax.Array,
    weights: jax.Array,
    size: int,
    count: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return the sum of the rows of a window times `weights`, laid end to end.

    Args:
        values: Of m rows of k entries, `(tiles, m * k, lanes)`.
        offsets: Of the same shape.
        weights: One for each entry of a block, `(m * k,)`, float32, or one for each in
            each tile, `(tiles, m * k)`.
        size: Entries a block, a power of two.
        count: Entries that are wanted, from the first.
        interpret: Whether to run the kernel on a CPU.

    Returns:
        Array of shape `(count,)`, float32.
    """
    tiles, entries, lanes = values.shape
    parts = lanes // _BLOCKS
    window = pl.BlockSpec((None, entries, _BLOCKS), lambda t, i: (t, 0, i))
    # Where there is one row of them, it is for all tiles.
    weights = weights.reshape(-1, entries)
    each = pl.BlockSpec((None, entries), lambda t, i: (t if len(weights) > 1 else 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, entries, size),
        grid=(tiles, parts),
        in_specs=[window, window, each],
        out_specs=pl.BlockSpec((count,), lambda t, i: (0,)),
        out_shape=jax.ShapeDtypeStruct((count,), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
    )(bits.pattern(values), offsets, weights)


def _kernel(entries, size, values, offsets, weights, out):
    """Add one entry of each block after the other."""
    place = lax.broadcasted_iota(jnp.int32, (_BLOCKS, size), 1)

    def add(i, total):
        value = bits.floats(values[i, :]) * weights[i]
        offset = offsets[i, :].astype(jnp.int32)
        return total + jnp.where(offset[:, None] == place, value[:, None], 0.0)

    total = jnp.zeros((_BLOCKS, size), jnp.float32)
    total = lax.fori_loop(0, entries, add, total)
    # Only as far as the last leaf reaches.
    program = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    start = program * total.size
    wanted = start + jnp.arange(total.size) < out.shape[0]
    plgpu.store(out.at[pl.ds(start, total.size)], total.reshape(-1), mask=wanted)

"""Error feedback of sparse rows by one kernel for TPUs: add, select and subtract.

It moves 12 bytes an entry with an error of float32, and 6 with one of 8 bits, where
adding, selecting and subtracting by themselves move 24.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.experimental import pl, pltpu
from efcp_jax.numerics import saturate
from efcp_jax.passes import tpu_errors, tpu_round, tpu_select, tpu_tiles as layout
from efcp_jax.passes.tpu_tiles import LANES
from efcp_jax.varying import struct


def feed(
    error: Any,
    gradient: jax.Array,
    accept: jax.Array,
    count: jax.Array,
    kept: int,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Any]:
    """Add the gradient to the error, select, and leave what is not selected: one pass.

    Rounding commutes with multiplying by a power of two, so a scale for the row can be
    found behind this pass.

    Args:
        error: Shape `(blocks, size)`, float32 or bfloat16, or `Quantized`; overwritten.
        gradient: Shape `(blocks, size)`, float32.
        accept: Whether to add the gradient and to subtract what is selected.
        count: The number of the step, by which an error of 8 bits is rounded.
        kept: Number of entries kept of each block, in [1, size].
        dtype: What the values are rounded to, within its range: bfloat16 or float32, or
            one of `scaled.DTYPES`.
        interpret: Whether to run the kernel on a CPU.

    Returns:
        Rounded values, float32, and offsets, int32, both `(tiles, kept, 128)`, and the
        new error.
    """
    size = gradient.shape[1]
    dtype = jnp.dtype(dtype)
    form = tpu_errors.form(error)

    def rounding(tile: jax.Array) -> Callable[[jax.Array], jax.Array]:
        if dtype.itemsize == 1:
            return tpu_round.to_tile(tile, dtype)
        return lambda x: saturate(x, dtype).astype(jnp.float32)

    def kernel(accept, count, gradient, *refs):
        before, (values, offsets), after = (
            refs[: form.arrays],
            refs[form.arrays : form.arrays + 2],
            refs[form.arrays + 2 :],
        )
        accepted = accept[0, 0] != 0
        first = pl.program_id(0) * values.shape[0]

        def tile(t, _):
            old = form.read(before, t, size)
            total = saturate(old + layout.read(gradient, t, size), jnp.float32)
            total = jnp.where(accepted, total, old)
            taken = tpu_select.pick(total, kept, t, values, offsets, rounding(total))
            left = jnp.where(accepted, total - taken, total)
            place = tpu_errors.Place(t, first + t, size, count[0, 0], accepted)
            form.write(before, after, left, place)
            return 0

        lax.fori_loop(0, values.shape[0], tile, 0)

    tiles = gradient.shape[0] // LANES
    group = layout.group(tiles, 12 * size + 8 * kept)
    row = [tpu_select.row_spec(group, kept)] * 2
    vector = layout.vector_spec(group, size)
    scalar = pl.BlockSpec((1, 1), lambda i: (0, 0), memory_space=pltpu.SMEM)
    operands, specs = form.operands(error, group, size)
    shapes = [struct(x.shape, x.dtype, gradient) for x in operands]
    call = pl.pallas_call(
        kernel,
        grid=(-(-tiles // group),),
        in_specs=[scalar, scalar, vector, *specs],
        out_specs=[*row, *specs],
        out_shape=[*tpu_select.rows(tiles, kept, gradient), *shapes],
        input_output_aliases={3 + i: 2 + i for i in range(form.arrays)},
        cost_estimate=layout.cost(tpu_select.ROUND * kept * gradient.size),
        compiler_params=layout.parallel(),
        interpret=interpret,
    )
    one = lambda x: x.astype(jnp.int32).reshape(1, 1)
    given = one(accept), one(count), layout.turn(gradient, size), *operands
    values, offsets, *rest = layout.launch(call, [3], interpret, *given)
    return values, offsets, form.result(rest, size)

"""Vectors in tiles of 128 blocks, as kernels for TPUs read and write them.

Inside a kernel the blocks of a tile lie on lanes and the entries of a block on
sublanes, so that a maximum over entries, or comparing an offset with every entry, works
on whole registers. Vectors come as XLA stores them: if the entries of a block fill
lanes, they lie there and are transposed in fast memory; else blocks are there already.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efcp_jax.experimental import pl, pltpu


# Lanes of a register: blocks of a tile, and entries that are transposed at a time.
LANES = 128

# About how many bytes a program reads and writes; twice as many are held. Much less
# would not hide what it takes to start a program and its copies.
_PROGRAM = 1 << 20


def fits(array: jax.Array, lanes: int) -> bool:
    """Return whether there are kernels for tiles of so many blocks of this dtype."""
    return pltpu is not None and lanes == LANES and array.dtype == jnp.float32


def group(tiles: int, width: int) -> int:
    """Return how many tiles, of `width` bytes a block, a program takes."""
    return max(1, min(tiles, _PROGRAM // (width * LANES)))


def cost(operations: int) -> Any:
    """Return the cost of so many operations.

    Bytes are left out: a kernel moves its operands and results once, which whoever
    reads the program counts from there.
    """
    return pl.CostEstimate(flops=operations, transcendentals=0, bytes_accessed=0)


def parallel(*others: str) -> Any:
    """Return that programs may run in any order along the first axis of their grid.

    Args:
        *others: The same for each further axis: "arbitrary" where one adds to what
            another has made.
    """
    return pltpu.CompilerParams(dimension_semantics=("parallel", *others))


def launch(
    kernel: Callable[..., Any], main: Sequence[int], interpret: bool, *operands: Any
) -> Any:
    """Return what a kernel makes of `operands`, some of them kept in main memory.

    XLA moves what fits into fast memory there, whole; a kernel moves what it needs.

    Args:
        kernel: A function that `pallas_call` has returned.
        main: The numbers of the operands that are kept in main memory.
        interpret: Whether the kernel runs on a CPU, where there is one memory.
        *operands: Arrays.
    """
    kernel = _narrow(kernel)
    if interpret:
        return kernel(*operands)

    held = lambda array: pltpu.with_memory_space_constraint(array, pltpu.HBM)

    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> Any:
        each = enumerate(operands)
        return kernel(*(held(x) if i in main else x for i, x in each))

    @call.def_vmap
    def _(size: int, batched: list[bool], *operands: jax.Array):
        """Batch the kernel by itself: there is no rule for where memory is."""
        del size
        axes = [0 if each else None for each in batched]
        out = jax.vmap(kernel, in_axes=axes)(*operands)
        return out, jax.tree.map(lambda _: True, out)

    return call(*operands)


def _narrow(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return `kernel`, its places counted in 32 bits where numbers of 64 are on.

    Every platform's form is traced wherever a program runs, so that this one would
    fail on CPUs as well.
    """

    def call(*operands: jax.Array) -> Any:
        with jax.enable_x64(False):
            return kernel(*operands)

    return call


def turn(vector: jax.Array, size: int) -> jax.Array:
    """Return `vector`, `(blocks, size)`, as kernels read it, or the reverse."""
    # XLA stores it so that this moves nothing.
    return vector if size % LANES == 0 else vector.T


def vector_spec(group: int, size: int) -> Any:
    """Return the part of a vector that a program takes: `group` tiles."""
    if size % LANES == 0:
        return pl.BlockSpec((group * LANES, size), lambda i, *_: (i, 0))
    return pl.BlockSpec((size, group * LANES), lambda i, *_: (0, i))


def read(ref: Any, t: Any, size: int, low: int = 0, high: int | None = None):
    """Return entries from `low` to `high` of tile `t` of a vector, on sublanes."""
    span = pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
    if size % LANES == 0:
        return ref[span, low:high].T
    return ref[low:high, span]


def write(ref: Any, t: Any, size: int, entries: jax.Array, low: int = 0):
    """Write what `read` returns."""
    span = pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
    high = low + len(entries)
    if size % LANES == 0:
        ref[span, low:high] = entries.T
    else:
        ref[low:high, span] = entries


def lines(scales: jax.Array) -> jax.Array:
    """Return numbers for each entry of a tile, `(tiles, n)`, as kernels read them.

    They lie on lanes, `(tiles, 1, n)`, n filled up to whole registers. Spread over all
    blocks by XLA they would take twice the bytes of the entries.
    """
    missing = -scales.shape[1] % LANES
    return jnp.pad(scales, ((0, 0), (0, missing)))[:, None]


def column(line: jax.Array) -> jax.Array:
    """Return a line of numbers, `(1, n)`, on sublanes, `(n, 128)`."""
    return jnp.broadcast_to(line, (LANES, line.shape[1])).T

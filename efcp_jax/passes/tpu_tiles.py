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
from efcp_jax.numerics import saturate


# Lanes of a register: blocks of a tile, and entries that are transposed at a time.
LANES = 128

# About how many bytes a program reads and writes; twice as many are held. Much less
# would not hide what it takes to start a program and its copies.
_PROGRAM = 1 << 20


def fits(form: Any, dtype: Any) -> bool:
    """Return whether there are kernels for tiles of so many blocks of this dtype."""
    return pltpu is not None and form.tile == LANES and dtype == jnp.float32


def group(tiles: int, width: int) -> int:
    """Return how many tiles, of `width` bytes a block, a program takes."""
    return max(1, min(tiles, _PROGRAM // (width * LANES)))


def launch(
    kernel: Callable[..., Any],
    *operands: jax.Array,
    main: Sequence[int],
    order: tuple[str, ...] = (),
    interpret: bool = False,
    **given: Any,
) -> Any:
    """Return what a kernel makes of `operands`, some of them kept in main memory.

    XLA moves what fits into fast memory there, whole; a kernel moves what it needs.

    Args:
        kernel: A function of references.
        *operands: Arrays.
        main: The numbers of the operands that are kept in main memory.
        order: "arbitrary" for each axis of the grid behind the first along which one
            program adds to what another has made; else programs run in any order.
        interpret: Whether the kernel runs on a CPU, where there is one memory.
        **given: More for `pallas_call`.
    """
    call = pl.pallas_call(
        kernel,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", *order)),
        interpret=interpret,
        **given,
    )

    def narrow(*operands: jax.Array) -> Any:
        # Places are counted in 32 bits where numbers of 64 are on. Every platform's
        # form is traced wherever a program runs, so this would fail on CPUs as well.
        with jax.enable_x64(False):
            return call(*operands)

    if interpret:
        return narrow(*operands)
    return _kept_in_main_memory(narrow, main)(*operands)


def _kept_in_main_memory(kernel: Callable[..., Any], main: Sequence[int]) -> Any:
    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> Any:
        held = lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM)
        return kernel(*(held(x) if i in main else x for i, x in enumerate(operands)))

    @call.def_vmap
    def _(size: int, batched: list[bool], *operands: jax.Array):
        """Batch the kernel by itself: there is no rule for where memory is."""
        del size
        axes = [0 if each else None for each in batched]
        out = jax.vmap(kernel, in_axes=axes)(*operands)
        return out, jax.tree.map(lambda _: True, out)

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
    # Floats of 32 bits, as which everything is turned.
    if size % LANES == 0:
        return ref[span, low:high].astype(jnp.float32).T
    return ref[low:high, span].astype(jnp.float32)


def write(ref: Any, t: Any, size: int, entries: jax.Array, low: int = 0):
    """Write what `read` returns, in the dtype of the vector."""
    span = pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
    high = low + len(entries)
    if ref.dtype == jnp.int8:
        narrow = lambda x: x.astype(jnp.int32).astype(jnp.int8)
    else:
        narrow = lambda x: saturate(x, ref.dtype)
    if size % LANES == 0:
        ref[span, low:high] = narrow(entries.T)
    else:
        ref[low:high, span] = narrow(entries)


def floats(values: jax.Array) -> jax.Array:
    """Return values as float32; those of int8 are widened by way of int32."""
    whole = values.dtype == jnp.int8
    return (values.astype(jnp.int32) if whole else values).astype(jnp.float32)


def add(places, weighted, entry, distinct, total):
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

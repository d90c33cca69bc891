"""Tiles of 128 blocks, as kernels for TPUs read and write them.

The blocks of a tile lie on lanes and the entries of a block on sublanes, so that maxima
over entries and comparisons work on whole registers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efcp_jax.experimental import pl, pltpu


# Lanes of a register: blocks of a tile.
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
    """Return what a kernel makes of `operands`; those of numbers `main` are not moved.

    XLA moves what fits into fast memory there, whole; a kernel moves what it needs.
    `order` is "arbitrary" for each axis of the grid behind the first along which one
    program adds to what another has made; else programs run in any order. If they are
    to `interpret`, they run on a CPU, where there is one memory.
    """
    call = pl.pallas_call(
        kernel,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", *order)),
        interpret=interpret,
        **given,
    )

    @jax.custom_batching.custom_vmap
    def run(*operands: jax.Array) -> Any:
        held = lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM)
        return narrow(*(held(x) if i in main else x for i, x in enumerate(operands)))

    @run.def_vmap
    def _(size: int, batched: list[bool], *operands: jax.Array):
        """Batch the kernel by itself: there is no rule for where memory is."""
        del size
        out = jax.vmap(narrow, [0 if each else None for each in batched])(*operands)
        return out, jax.tree.map(lambda _: True, out)

    def narrow(*operands: jax.Array) -> Any:
        # Places are counted in 32 bits where numbers of 64 are on. Every platform's
        # form is traced wherever a program runs, so this would fail on CPUs as well.
        with jax.enable_x64(False):
            return call(*operands)

    return (narrow if interpret else run)(*operands)


def spec(group: int, entries: int) -> Any:
    """Return the part of an array that a program takes: `group` tiles."""
    return pl.BlockSpec((group, entries, LANES), lambda i, *_: (i, 0, 0))


def floats(values: jax.Array) -> jax.Array:
    """Return values as float32; those of int8 are widened by way of int32."""
    whole = values.dtype == jnp.int8
    return (values.astype(jnp.int32) if whole else values).astype(jnp.float32)


def lines(scales: jax.Array) -> jax.Array:
    """Return numbers for each entry of a tile, `(tiles, n)`, on lanes, `(tiles, 1, n)`.

    n is filled up to whole registers. Spread over all blocks by XLA they would take
    twice the bytes of the entries.
    """
    return jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % LANES)))[:, None]


def column(line: jax.Array) -> jax.Array:
    """Return a line of numbers, `(1, n)`, on sublanes, `(n, 128)`."""
    return jnp.broadcast_to(line, (LANES, line.shape[1])).T


def line(numbers: jax.Array, width: int) -> jax.Array:
    """Return a number for each entry, `(n, 1)`, on lanes, `(1, width)`."""
    spread = jnp.broadcast_to(numbers, (len(numbers), LANES))
    filled = jnp.pad(spread, ((0, width - len(numbers)), (0, 0)))
    return filled.T[:1]

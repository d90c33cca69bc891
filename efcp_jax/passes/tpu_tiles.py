"""Vectors in tiles of 128 blocks, as kernels for TPUs read and write them.

Inside a kernel the blocks of a tile lie on lanes and the entries of a block on
sublanes, so that maxima over entries and comparisons work on whole registers. Vectors
come as XLA stores them: if the entries of a block fill lanes, they lie there and are
transposed in fast memory; else blocks are there already.
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
    # Floats of 32 bits, as which everything is turned.
    entries = ref[_at(t, size, low, high)].astype(jnp.float32)
    return entries.T if size % LANES == 0 else entries


def write(ref: Any, t: Any, size: int, entries: jax.Array, low: int = 0):
    """Write what `read` returns, in the dtype of the vector."""
    at = _at(t, size, low, low + len(entries))
    entries = entries.T if size % LANES == 0 else entries
    if ref.dtype == jnp.int8:
        ref[at] = entries.astype(jnp.int32).astype(jnp.int8)
    else:
        ref[at] = saturate(entries, ref.dtype)


def _at(t: Any, size: int, low: int, high: int | None) -> tuple[Any, Any]:
    blocks = pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
    entries = slice(low, high)
    return (blocks, entries) if size % LANES == 0 else (entries, blocks)


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

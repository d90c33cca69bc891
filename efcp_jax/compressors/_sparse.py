"""Passes over a window of sparse rows: inner products and sums, block by block.

CPUs take a few blocks at a time, so that what is touched stays in the cache and
temporaries are of the size of a chunk; accelerators take chunks that keep them busy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


# Entries of the window processed at a time. On CPUs a loop round takes as long as a few
# thousand entries.
_CPU_INNER = 1 << 15
_CPU_COMBINE = 1 << 12
_ACCELERATOR = 1 << 24


class SparseRow(NamedTuple):
    """The kept entries of every block.

    Attributes:
        values: The entries, shape `(blocks, k)`; a window has `(blocks, m, k)`.
        offsets: Their positions inside the block, of the same shape, in the smallest
            unsigned type that holds the block size.
    """

    values: jax.Array
    offsets: jax.Array


def inner(window: SparseRow, row: SparseRow, size: int) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`.

    Args:
        window: The rows, `(blocks, m, k)`.
        row: One more row, `(blocks, k)`, with values in the dtype of the result.
        size: Entries a block.

    Returns:
        Array of shape `(m,)`.
    """
    dtype = row.values.dtype
    count, rows, kept = window.values.shape

    def products(start: Any, chunk: int) -> jax.Array:
        part, newest = _part(window, start, chunk), _slice(row, start, chunk)
        vector = scatter_add(size, newest.offsets, newest.values)
        index = _positions(size, part.offsets)
        taken = vector.reshape(-1).at[index].get(mode="promise_in_bounds")
        return part.values.astype(dtype) * taken

    def on_cpu() -> jax.Array:
        # Sums of whole chunks, entry by entry, are vectorised. A sum along a row would
        # wait for each addition.
        chunk = _chunk(window, _CPU_INNER)
        add = lambda total, start, chunk: total + products(start, chunk)
        whole = count // chunk * chunk
        zeros = jnp.zeros((chunk, rows, kept), dtype)
        total = jnp.sum(_sweep(whole, chunk, zeros, add), axis=(0, 2))
        if whole < count:
            total += jnp.sum(products(whole, count - whole), axis=(0, 2))
        return total

    def elsewhere() -> jax.Array:
        def add(total: jax.Array, start: Any, chunk: int) -> jax.Array:
            return total + jnp.sum(products(start, chunk), axis=(0, 2))

        chunk = _chunk(window, _ACCELERATOR)
        return _sweep(count, chunk, jnp.zeros(rows, dtype), add)

    return lax.platform_dependent(cpu=on_cpu, default=elsewhere)


def combine(
    window: SparseRow,
    coefficients: jax.Array,
    size: int,
    blocks: range,
    out: jax.Array,
    place: Callable[[jax.Array, Any, jax.Array], jax.Array],
) -> jax.Array:
    """Write the sums of the rows of `window`, times coefficients, into `out`.

    Args:
        window: The rows, `(blocks, m, k)`.
        coefficients: One for each row, shape `(m,)`.
        size: Entries a block.
        blocks: The blocks that are wanted.
        out: Where they go.
        place: From `out`, a block and the sums of n blocks from there, `(n, size)`, to
            `out` overwritten.

    Returns:
        What `place` returned last.
    """
    flat = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1), window)
    # One coefficient for every entry of a block, so that a block is flat.
    each = jnp.repeat(coefficients, window.values.shape[2])
    first = blocks.start

    def write(out: jax.Array, start: Any, chunk: int) -> jax.Array:
        part = _part(flat, first + start, chunk)
        entries = part.values.astype(each.dtype) * each
        return place(out, first + start, scatter_add(size, part.offsets, entries))

    def sweep(entries: int) -> jax.Array:
        return _sweep(len(blocks), _chunk(window, entries), out, write)

    return lax.platform_dependent(
        cpu=lambda: sweep(_CPU_COMBINE), default=lambda: sweep(_ACCELERATOR)
    )


def scatter_add(size: int, offsets: jax.Array, entries: jax.Array) -> jax.Array:
    """Return the sums of `entries`, `(c, n)`, by `offsets`; shape `(c, size)`."""
    zeros = jnp.zeros(len(entries) * size, entries.dtype)
    index = _positions(size, offsets).reshape(-1)
    summed = zeros.at[index].add(entries.reshape(-1), mode="promise_in_bounds")
    return summed.reshape(-1, size)


def _positions(size: int, offsets: jax.Array) -> jax.Array:
    """Return `offsets`, `(c, ...)`, counted from the first of the c blocks."""
    # Unsigned, so that indexing does not look for negative numbers.
    offsets = offsets.astype(jnp.uint32)
    if len(offsets) == 1:
        return offsets
    first = jnp.arange(len(offsets), dtype=jnp.uint32) * size
    return offsets + first.reshape(-1, *[1] * (offsets.ndim - 1))


def _chunk(window: SparseRow, entries: int) -> int:
    """Return how many blocks of `window` have about `entries` entries."""
    count, rows, kept = window.values.shape
    return min(count, max(1, entries // (rows * kept)))


def _sweep(
    count: int,
    chunk: int,
    start: jax.Array,
    step: Callable[[jax.Array, Any, int], jax.Array],
) -> jax.Array:
    """Fold `step(carry, first block, number of blocks)` over `count` blocks."""
    chunk = max(1, min(chunk, count))
    whole = count // chunk
    carry = lax.fori_loop(
        0, whole, lambda i, carry: step(carry, i * chunk, chunk), start
    )
    if count % chunk:
        carry = step(carry, whole * chunk, count % chunk)
    return carry


def _slice(tree: Any, start: Any, chunk: int) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, chunk), tree)


def _part(window: Any, start: Any, chunk: int) -> Any:
    """Return `chunk` blocks of every array of `window`."""
    # Without a barrier that depends on the round, XLA on CPUs would hoist the
    # conversion of bfloat16 out of the loop: a float32 window.
    window, _ = lax.optimization_barrier((window, start))
    return _slice(window, start, chunk)

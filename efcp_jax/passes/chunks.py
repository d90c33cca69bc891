"""Passes over a window of sparse rows: inner products and sums, block by block.

CPUs take a few blocks at a time, so that what is touched stays in the cache and
temporaries are of the size of a chunk; accelerators take chunks that keep them busy.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.passes.entries import SparseRow, Stored


# Entries of the window processed at a time. On CPUs a loop round takes as long as a few
# thousand entries, and XLA spreads sums over cores from 128 thousand entries on.
_CPU_INNER = 3 << 16
_CPU_COMBINE = 1 << 12
_ACCELERATOR = 1 << 24


# From entries as they are stored to their values and offsets.
_Load = Callable[[Stored], tuple[jax.Array, jax.Array]]


def inner(window: Stored, row: SparseRow, size: int, load: _Load) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`.

    Args:
        window: The rows as they are stored, `(blocks, m, k)`.
        row: One more row, `(blocks, k)`, with values in the dtype of the result.
        size: Entries a block.
        load: From entries of `window` to their values and offsets.

    Returns:
        Array of shape `(m,)`.
    """
    dtype = row.values.dtype
    count, rows, kept = _shape(window)

    def products(start: Any, chunk: int) -> jax.Array:
        values, offsets = load(_part(window, start, chunk))
        newest = _slice(row, start, chunk)
        vector = scatter_add(size, newest.offsets, newest.values)
        index = _positions(size, offsets)
        taken = vector.reshape(-1).at[index].get(mode="promise_in_bounds")
        return values * taken

    def on_cpu() -> jax.Array:
        # Sums of whole chunks, entry by entry, are vectorised. A sum along a row would
        # wait for each addition.
        # Where there are few blocks, what is set up for a chunk counts.
        chunk = min(_chunk(window, _CPU_INNER), max(1, count // 8))
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
    window: Stored,
    coefficients: jax.Array,
    size: int,
    load: _Load,
    blocks: range,
    out: jax.Array,
    place: Callable[[jax.Array, Any, jax.Array], jax.Array],
) -> jax.Array:
    """Write the sums of the rows of `window`, times coefficients, into `out`.

    Args:
        window: The rows as they are stored, `(blocks, m, k)`.
        coefficients: One for each row, shape `(m,)`.
        size: Entries a block.
        load: From entries of `window` to their values and offsets.
        blocks: The blocks that are wanted.
        out: Where they go.
        place: From `out`, a block and the sums of n blocks from there, `(n, size)`, to
            `out` overwritten.

    Returns:
        What `place` returned last.
    """
    flat = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1), window)
    # One coefficient for every entry of a block, so that a block is flat.
    each = jnp.repeat(coefficients, _shape(window)[2])
    first = blocks.start

    def write(out: jax.Array, start: Any, chunk: int) -> jax.Array:
        values, offsets = load(_part(flat, first + start, chunk))
        return place(out, first + start, scatter_add(size, offsets, values * each))

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
    """Return `offsets`, `(c, ...)`, uint32, counted from the first of the c blocks."""
    if len(offsets) == 1:
        return offsets
    first = jnp.arange(len(offsets), dtype=jnp.uint32) * size
    return offsets + first.reshape(-1, *[1] * (offsets.ndim - 1))


def _shape(window: Stored) -> tuple[int, ...]:
    """Return the numbers of blocks, rows and kept entries."""
    return jax.tree.leaves(window)[0].shape


def _chunk(window: Stored, entries: int) -> int:
    """Return how many blocks of `window` have about `entries` entries."""
    count, rows, kept = _shape(window)
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

"""Sparse rows of large blocks, laid end to end: what the platforms' forms share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efcp_jax.numerics import indexed
from efcp_jax.passes.entries import SparseRow, Stored
from efcp_jax.passes.runs import joined, part


def chunk_products(
    form: Any, window: Stored, row: SparseRow, start: Any, chunk: int
) -> jax.Array:
    """Return the entries of `chunk` blocks from `start` times those of `row`."""
    values, offsets = form.storage.load(part(window, start, chunk), row.values.dtype)
    newest = part(row, start, chunk)
    vector = place(form.size, newest.offsets, newest.values)
    index = positions(form.size, offsets)
    return values * vector.at[index].get(mode="promise_in_bounds")


def place(
    size: int,
    offsets: jax.Array,
    values: jax.Array,
    out: jax.Array | None = None,
) -> jax.Array:
    """Return `out`, or zeros, with the entries of a row added, laid end to end."""
    out = jnp.zeros(len(values) * size, values.dtype) if out is None else out
    # Entries of a row lie at places of their own, or are zeros: added, not written.
    return out.at[positions(size, offsets)].add(
        values, mode="promise_in_bounds", unique_indices=True
    )


def in_reach(
    window: Stored, size: int, sums: Callable[[Stored], jax.Array]
) -> jax.Array:
    """Return the sums of a window, of its blocks as many at once as indices reach.

    Args:
        window: The rows as they are stored.
        size: Entries a block.
        sums: From some of the blocks to their entries, laid end to end.
    """
    most, count = indexed(size), shape(window)[0]
    cut = lambda first: jax.tree.map(lambda x: x[first : first + most], window)
    return joined([sums(cut(first)) for first in range(0, count, most)])


def positions(size: int, offsets: jax.Array) -> jax.Array:
    """Return `offsets`, `(c, n)`, uint32, counted from the first of the c blocks."""
    if len(offsets) == 1:
        return offsets
    first = jnp.arange(len(offsets), dtype=jnp.uint32) * size
    return offsets + first[:, None]


def shape(window: Stored) -> tuple[int, ...]:
    """Return the numbers of blocks, and of entries of all rows of a block."""
    return jax.tree.leaves(window)[0].shape

"""Entries at their places in blocks laid end to end: what the platforms share.

Entries have the shapes that they are stored in: `(blocks, n)`, or `(tiles, n, lanes)`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from efcp_jax.passes.entries import SparseRow


# Entries a block of a row up to which comparing every entry of a window with each of
# them takes less time than a gather.
MOST_MATCHES = 8


def matched(values: jax.Array, offsets: jax.Array, row: SparseRow) -> jax.Array:
    """Return every value of a window times the one of `row` at the same place, or 0."""
    at = jnp.zeros((), row.values.dtype)
    for i in range(row.values.shape[1]):
        value, offset = row.values[:, i : i + 1], row.offsets[:, i : i + 1]
        # A sum, so that entries of value 0 may share a place with another.
        at = at + jnp.where(offsets == offset, value, 0)
    return values * at


def positions(form: Any, offsets: jax.Array) -> jax.Array:
    """Return `offsets`, uint32, counted from the first of the blocks that they are of.

    They are unsigned, so that indexing looks for no negative ones.
    """
    offsets = offsets.astype(jnp.uint32)
    blocks = offsets.size // offsets.shape[1]
    if blocks == 1:
        return offsets
    first = jnp.arange(blocks, dtype=jnp.uint32) * form.size
    return offsets + form.from_blocks(first[:, None])


def taken(form: Any, vector: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return the entries at `offsets` of blocks laid end to end."""
    return vector.at[positions(form, offsets)].get(mode="promise_in_bounds")


def place(
    form: Any, values: jax.Array, offsets: jax.Array, out: jax.Array | None = None
) -> jax.Array:
    """Return `out`, or zeros, with the entries of a row added, laid end to end."""
    size = values.size // values.shape[1] * form.size
    out = jnp.zeros(size, values.dtype) if out is None else out
    # Entries of a row lie at places of their own, or are zeros: added, not written.
    return out.at[positions(form, offsets)].add(
        values, mode="promise_in_bounds", unique_indices=True
    )

"""Selection in rounds, and products by matching offsets: what platforms share.

Comparisons and sums of whole arrays, which every compiler fuses into one pass without
a temporary, and without a gather or a scatter.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.passes import reference
from efcp_jax.passes.bisection import largest
from efcp_jax.passes.entries import SparseRow, Tiled


# Entries a block of a row up to which comparing every entry of a window with each of
# them takes less time than a gather.
MOST_MATCHES = 8


def argmax_rounds(vector: jax.Array, kept: int) -> jax.Array:
    """Return the offsets of the `kept` largest entries of every row, one a round.

    Args:
        vector: Shape `(blocks, size)`.
        kept: Number of rounds.

    Returns:
        Array of shape `(blocks, kept)`, int32, ascending.
    """
    left = reference.magnitudes(vector)
    places = jnp.arange(vector.shape[1], dtype=jnp.int32)[None]
    found = []
    for _ in range(kept):
        found.append(jnp.argmax(left, axis=1).astype(jnp.int32))
        left = jnp.where(places == found[-1][:, None], -1, left)
    return jnp.stack(ascending(found), axis=1)


def ascending(arrays: list[jax.Array]) -> list[jax.Array]:
    """Sort a few arrays against each other, entry by entry."""
    arrays = list(arrays)
    for last in range(len(arrays) - 1, 0, -1):
        for i in range(last):
            low, high = arrays[i], arrays[i + 1]
            arrays[i], arrays[i + 1] = jnp.minimum(low, high), jnp.maximum(low, high)
    return arrays


def spread(row: SparseRow, size: int) -> jax.Array:
    """Return the blocks `(blocks, size)` that the entries add up to, by comparison."""
    places = lax.broadcasted_iota(row.offsets.dtype, (1, 1, 1, size), 3)
    here = row.offsets[..., None] == places
    return jnp.sum(jnp.where(here, row.values[..., None], 0), axis=1).reshape(-1, size)


def select(vector: jax.Array, *, kept: int, lanes: int) -> tuple[jax.Array, jax.Array]:
    """Return the entries of largest magnitude of every block; see `tiles`."""
    few = kept <= MOST_MATCHES
    offsets = argmax_rounds(vector, kept) if few else largest(vector, kept)
    values = jnp.take_along_axis(vector, offsets, axis=1, mode="promise_in_bounds")
    return reference.to_tiles(values, lanes), reference.to_tiles(offsets, lanes)


def residual(vector: jax.Array, values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return `vector` less the `values` at their places."""
    return vector - spread(SparseRow(values, offsets), vector.shape[1])


def combine(
    window: Tiled, weights: jax.Array, *, size: int, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    weighted = window.load(weights.dtype) * reference.per_entry(window, weights)
    return reference.cut(spread(SparseRow(weighted, window.offsets), size), runs)


def by_row(products: jax.Array, kept: int) -> jax.Array:
    """Return the sum of the products of each row, `(tiles, m k, lanes)` to `(m,)`."""
    return jnp.sum(jnp.sum(products, axis=(0, 2)).reshape(-1, kept), axis=1)


def matched(window: Tiled, row: SparseRow) -> jax.Array:
    """Return every entry of `window` times the entry of `row` at the same place.

    Args:
        window: Values and offsets `(tiles, n, lanes)`.
        row: Values `(tiles, k, lanes)` in the dtype of the result, and offsets.

    Returns:
        Array of shape `(tiles, n, lanes)`; 0 where `row` has no entry.
    """
    at = jnp.zeros((), row.values.dtype)
    for i in range(row.values.shape[1]):
        value, offset = row.values[:, i : i + 1], row.offsets[:, i : i + 1]
        # A sum, so that entries of value 0 may share a place with another.
        at = at + jnp.where(window.offsets == offset, value, 0)
    return window.load(row.values.dtype) * at

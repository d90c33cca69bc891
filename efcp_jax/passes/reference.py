"""The passes over sparse rows, as plainly as they can be written.

No platform is thought of here: this is what the forms of `cpu`, `gpu` and `tpu` must
compute, and the form of every other platform.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.passes.entries import SparseRow, Stored, Tiled


def select(vector: jax.Array, *, kept: int, lanes: int) -> tuple[jax.Array, jax.Array]:
    """Return the `kept` entries of largest magnitude of every block; see `tiles`."""
    order = jnp.argsort(-magnitudes(vector), axis=1, stable=True)
    offsets = to_tiles(jnp.sort(order[:, :kept], axis=1).astype(jnp.int32), lanes)
    return take(vector, offsets=offsets)


def take(vector: jax.Array, *, offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the values of `vector` at `offsets`, and `offsets`."""
    values = jnp.take_along_axis(vector, from_tiles(offsets), axis=1)
    return to_tiles(values, offsets.shape[2]), offsets


def residual(vector: jax.Array, values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return `vector` less the `values` at their places."""
    values, offsets = from_tiles(values), from_tiles(offsets)
    block = jnp.arange(len(vector), dtype=jnp.int32)[:, None]
    return vector.at[block, offsets].add(-values)


def inner(window: Tiled, row: SparseRow, *, size: int) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    return dot(window, scatter(row, size), kept=row.values.shape[1])


def dot(window: Tiled, vector: jax.Array, *, kept: int) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""
    offsets = from_tiles(window.offsets).astype(jnp.int32)
    at = jnp.take_along_axis(vector, offsets, axis=1)
    products = from_tiles(window.load(vector.dtype)) * at
    return jnp.sum(products.reshape(len(vector), -1, kept), axis=(0, 2))


def combine(
    window: Tiled, weights: jax.Array, *, size: int, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    weighted = window.load(weights.dtype) * per_entry(window, weights)
    return cut(scatter(SparseRow(weighted, window.offsets), size), runs)


def scatter(row: SparseRow, size: int) -> jax.Array:
    """Return the blocks `(blocks, size)` that the entries of `row` add up to."""
    return positioned(from_tiles(row.values), from_tiles(row.offsets), size)


def magnitudes(x: jax.Array) -> jax.Array:
    """Return integers that order like the magnitudes of `x`.

    Without its sign, the bit pattern of a float orders like its magnitude: infinity
    above all numbers and NaN above infinity.
    """
    dtype = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, dtype) & jnp.iinfo(dtype).max


def per_entry(window: Tiled, weights: jax.Array) -> jax.Array:
    """Return the weight of the row of each entry of a tile, `(1, n, 1)`."""
    return jnp.repeat(weights, window.values.shape[1] // len(weights))[None, :, None]


def to_tiles(entries: jax.Array, lanes: int) -> jax.Array:
    """Return `entries`, `(blocks, n)`, as `(tiles, n, lanes)`."""
    return entries.reshape(-1, lanes, entries.shape[1]).swapaxes(1, 2)


def from_tiles(entries: jax.Array) -> jax.Array:
    """Return `entries`, `(tiles, n, lanes)`, as `(blocks, n)`."""
    return entries.swapaxes(1, 2).reshape(-1, entries.shape[1])


def cut(blocks: jax.Array, runs: Any) -> list[jax.Array]:
    """Return the leaves of `runs` from the entries of `blocks`, laid end to end."""
    flat, start, leaves = blocks.reshape(-1), 0, []
    for size in (size for run in runs for size in run):
        leaves.append(lax.slice_in_dim(flat, start, start + size))
        start += size
    return leaves


def inner_large(window: Stored, row: SparseRow, *, form: Any) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    values, offsets = form.storage.load(window, row.values.dtype)
    dense = positioned(row.values, row.offsets, form.size)
    products = values * jnp.take_along_axis(dense, offsets, axis=1)
    return jnp.sum(products.reshape(len(dense), -1, form.kept), axis=(0, 2))


def combine_large(
    window: Stored, weights: jax.Array, *, form: Any, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    values, offsets = form.storage.load(window, weights.dtype)
    weighted = values * jnp.repeat(weights, form.kept)[None]
    return cut(positioned(weighted, offsets, form.size), runs)


def positioned(values: jax.Array, offsets: jax.Array, size: int) -> jax.Array:
    """Return the blocks `(blocks, size)` that entries `(blocks, n)` add up to."""
    block = jnp.arange(len(values), dtype=jnp.int32)[:, None]
    return jnp.zeros((len(values), size), values.dtype).at[block, offsets].add(values)

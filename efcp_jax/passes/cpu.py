"""Passes over small blocks on CPUs: loops over tiles that stay in the cache.

What is touched in one round is a few tiles, so that temporaries are small, and sums
are taken entry by entry, which vectorises. XLA's scattered addition takes 2 to 3 ns an
entry here, a comparison with every place of a block fifty times that.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax import varying
from efcp_jax.numerics import indexed
from efcp_jax.passes import reference
from efcp_jax.passes.bisection import largest
from efcp_jax.passes.entries import SparseRow, Stored, Tiled
from efcp_jax.passes.matching import MOST_MATCHES, argmax_rounds, matched
from efcp_jax.passes.places import chunk_products, positions, shape
from efcp_jax.passes.runs import part, sweep, write


# Rounds of argmax that take less time than a bisection.
_MOST_ROUNDS = 4

# Entries of the window of one round. XLA spreads sums over cores from 128 thousand
# entries on; scattered additions run on one core and are best inside its cache.
_INNER = 3 << 16
_COMBINE = 1 << 12

# Rounds that a sum is worth to be set up for.
_FEWEST_ROUNDS = 8


def select(vector: jax.Array, *, kept: int, lanes: int) -> tuple[jax.Array, jax.Array]:
    """Return the entries of largest magnitude of every block; see `tiles`."""
    few = kept <= _MOST_ROUNDS
    offsets = argmax_rounds(vector, kept) if few else largest(vector, kept)
    values = jnp.take_along_axis(vector, offsets, axis=1)
    return reference.to_tiles(values, lanes), reference.to_tiles(offsets, lanes)


def residual(vector: jax.Array, values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return `vector` less the `values` at their places, in place."""
    values, offsets = reference.from_tiles(values), reference.from_tiles(offsets)
    block = jnp.arange(len(vector), dtype=jnp.int32)[:, None]
    return vector.at[block, offsets.astype(jnp.int32)].add(-values, unique_indices=True)


def inner(window: Tiled, row: SparseRow, *, size: int) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    kept, dtype = row.values.shape[1], row.values.dtype

    def products(rows: Tiled, start: Any, chunk: int) -> jax.Array:
        newest = part(row, start, chunk)
        if kept <= MOST_MATCHES:
            return matched(rows, newest)
        return _taken(rows, reference.scatter(newest, size))

    return _summed(window, products, kept, dtype)


def dot(window: Tiled, vector: jax.Array, *, kept: int) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""
    lanes = window.values.shape[2]

    def products(rows: Tiled, start: Any, chunk: int) -> jax.Array:
        blocks = lax.dynamic_slice_in_dim(vector, start * lanes, chunk * lanes)
        return _taken(rows, blocks)

    return _summed(window, products, kept, vector.dtype)


def _taken(rows: Tiled, vector: jax.Array) -> jax.Array:
    """Return each entry of `rows` times that of `vector` at its place."""
    offsets = reference.from_tiles(rows.offsets).astype(jnp.uint32)
    taken = jnp.take_along_axis(vector, offsets, 1, mode="promise_in_bounds")
    return rows.load(vector.dtype) * reference.to_tiles(taken, rows.values.shape[2])


def _summed(window: Tiled, products: Any, kept: int, dtype: Any) -> jax.Array:
    """Return the sums of `products(rows, start, chunk)` of some tiles after others."""
    tiles, entries, lanes = window.values.shape
    of = lambda start, chunk: products(part(window, start, chunk), start, chunk)
    add = lambda total, start, chunk: total + of(start, chunk)
    chunk = max(1, min(_INNER // (entries * lanes), tiles // _FEWEST_ROUNDS))
    whole = tiles // chunk * chunk
    zeros = varying.like(window, jnp.zeros((chunk, entries, lanes), dtype))
    total = jnp.sum(sweep(whole, chunk, zeros, add), axis=(0, 2))
    if whole < tiles:
        total += jnp.sum(of(whole, tiles - whole), axis=(0, 2))
    return jnp.sum(total.reshape(-1, kept), axis=1)


def combine(
    window: Tiled, weights: jax.Array, *, size: int, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    _, entries, lanes = window.values.shape
    each = reference.per_entry(window, weights)

    def sums(start: Any, chunk: int) -> jax.Array:
        rows = part(window, start, chunk)
        values = rows.load(weights.dtype) * each
        block = jnp.arange(chunk * lanes, dtype=jnp.uint32).reshape(chunk, 1, lanes)
        index = rows.offsets.astype(jnp.uint32) + size * block
        zeros = jnp.zeros(chunk * lanes * size, weights.dtype)
        return zeros.at[index.reshape(-1)].add(
            values.reshape(-1), mode="promise_in_bounds"
        )

    chunk = max(1, _COMBINE // (entries * lanes))
    return write(runs, lanes * size, chunk, sums, jnp.zeros_like(weights[0]))


def inner_large(window: Stored, row: SparseRow, *, form: Any) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    # Sums of whole chunks, entry by entry, are vectorised. A sum along a row would
    # wait for each addition.
    count, entries = shape(window)
    products = functools.partial(chunk_products, form, window, row)
    add = lambda total, start, chunk: total + products(start, chunk)
    chunk = min(_INNER // entries, count // _FEWEST_ROUNDS, indexed(form.size))
    chunk = max(1, chunk)
    whole = count // chunk * chunk
    zeros = varying.like(window, jnp.zeros((chunk, entries), row.values.dtype))
    # A sum over blocks and then over entries takes three times as long as one of both.
    of_rows = lambda x: jnp.sum(form.by_block(x), axis=(0, 2))
    total = of_rows(sweep(whole, chunk, zeros, add))
    if whole < count:
        total += of_rows(products(whole, count - whole))
    return total


def combine_large(
    window: Stored, weights: jax.Array, *, form: Any, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    entries = shape(window)[1]
    each = jnp.repeat(weights, form.kept)

    def sums(start: Any, chunk: int) -> jax.Array:
        values, offsets = form.storage.load(part(window, start, chunk), weights.dtype)
        index = positions(form.size, offsets).reshape(-1)
        zeros = jnp.zeros(chunk * form.size, weights.dtype)
        added = (values * each[None]).reshape(-1)
        return zeros.at[index].add(added, mode="promise_in_bounds")

    chunk = max(1, min(_COMBINE // entries, indexed(form.size)))
    return write(runs, form.size, chunk, sums, jnp.zeros_like(weights[0]))

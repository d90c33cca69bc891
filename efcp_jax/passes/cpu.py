"""Passes on CPUs: loops over blocks that stay in the cache.

What is touched in one round is a few blocks, so that temporaries are small, and sums
are taken entry by entry, which vectorises. XLA's scattered addition takes 2 to 3 ns an
entry here, a comparison with every place of a small block fifty times that.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax import varying
from efcp_jax.devices.sections import part, sweep, write
from efcp_jax.numerics import indexed
from efcp_jax.passes import selection
from efcp_jax.passes.entries import SparseRow, Stored
from efcp_jax.passes.places import MOST_MATCHES, matched, place, positions, taken
from efcp_jax.passes.reference import residual as residual


# Rounds of argmax that take less time than a bisection.
_MOST_ROUNDS = 4

# Entries of the window of one round. XLA spreads sums over cores from 128 thousand
# entries on; scattered additions run on one core and are best inside its cache.
_INNER = 3 << 16
_COMBINE = 1 << 12

# Rounds that a sum is worth to be set up for.
_FEWEST_ROUNDS = 8


def select(form: Any, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the entries of largest magnitude of every block."""
    return selection.select(form, vector, _MOST_ROUNDS)


def inner(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""

    def products(values: jax.Array, offsets: jax.Array, start: Any, chunk: int):
        newest = part(row, start, chunk)
        if form.tile and form.kept <= MOST_MATCHES:
            return matched(values, offsets, newest)
        return values * taken(form, place(form, *newest), offsets)

    return _summed(form, window, products, row.values.dtype)


def dot(form: Any, window: Stored, vector: jax.Array) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""

    def products(values: jax.Array, offsets: jax.Array, start: Any, chunk: int):
        at = start * form.lanes
        blocks = lax.dynamic_slice_in_dim(vector, at, chunk * form.lanes)
        return values * taken(form, blocks.reshape(-1), offsets)

    return _summed(form, window, products, vector.dtype)


def _summed(form: Any, window: Stored, products: Any, dtype: Any) -> jax.Array:
    """Return the sum for each row of `products(values, offsets, first unit, units)`."""
    # Sums of whole chunks, entry by entry, are vectorised. A sum along a row would
    # wait for each addition.
    units, *shape = jax.tree.leaves(window)[0].shape

    def of(start: Any, chunk: int) -> jax.Array:
        values, offsets = form.storage.load(part(window, start, chunk), dtype)
        return products(values, offsets, start, chunk)

    # A sum over blocks and then over entries takes three times as long as one of both.
    by_row = lambda x: jnp.sum(
        x.reshape(len(x), -1, form.kept * form.lanes), axis=(0, 2)
    )
    add = lambda total, start, chunk: total + of(start, chunk)
    chunk = _INNER // (shape[0] * form.lanes)
    chunk = min(chunk, units // _FEWEST_ROUNDS, indexed(form.size * form.lanes))
    chunk = max(1, chunk)
    whole = units // chunk * chunk
    zeros = varying.like(window, jnp.zeros((chunk, *shape), dtype))
    total = by_row(sweep(whole, chunk, zeros, add))
    return total + by_row(of(whole, units - whole)) if whole < units else total


def combine(
    form: Any, window: Stored, weights: jax.Array, *, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    each, unit = form.per_entry(weights), form.lanes * form.size

    def sums(start: Any, chunk: int) -> jax.Array:
        values, offsets = form.storage.load(part(window, start, chunk), weights.dtype)
        index = positions(form, offsets).reshape(-1)
        zeros, added = jnp.zeros(chunk * unit, weights.dtype), (values * each).ravel()
        return zeros.at[index].add(added, mode="promise_in_bounds")

    entries = len(weights) * form.kept * form.lanes
    chunk = max(1, min(_COMBINE // entries, indexed(unit)))
    return write(runs, unit, chunk, sums, jnp.zeros_like(weights[0]))

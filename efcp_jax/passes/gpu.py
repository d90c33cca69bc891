"""Passes by XLA alone on GPUs, and over large blocks on TPUs.

Each sum is in one fixed order, which atomics would not have. Comparing each entry with
every place of a small block takes no temporary, and less time than the bytes of the
window while the window has a few hundred rows. In blocks of more than 256 entries GPUs
scatter row after row, whose entries lie at places of their own; TPUs, slow at gathers
and scatters, compare offsets and multiply.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.collectives import vary_like
from efcp_jax.devices.sections import at_run_time, part, section, sweep, write
from efcp_jax.numerics import contract, indexed
from efcp_jax.passes import reference, selection
from efcp_jax.passes.entries import COMMUTING, SparseRow, Stored


# Entries a block of a row up to which comparing every entry of a window with each of
# them takes less time than a gather.
MOST_MATCHES = 8

# Entries of a window gathered at a time, to keep all cores busy, and of one of which
# sums are made at a time by products.
_GATHERED = 1 << 24
_MULTIPLIED = 1 << 20

# Entries up to which an error is fed, or an update made, at once. Above it temporaries
# of that size would count: there are so many parts to feed, each of kernels of its own,
# and so many rounds of one loop for an update, but none of fewer entries than the last.
_WHOLE = 1 << 21
_PARTS = 8
_ROUNDS = 32
_LEAST = 1 << 19


select = functools.partial(
    selection.select, rounds=MOST_MATCHES, first=selection.argmax
)


def residual(
    form: Any, vector: jax.Array, values: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Return `vector` less the `values` at their places."""
    if not form.tile:
        return reference.residual(form, vector, values, offsets)
    return vector - _spread(form, values, offsets)


def feeds(form: Any, error: Any) -> bool:
    """Return whether `feed` takes this error, and is worth its kernels."""
    few = form.tile is not None and form.kept <= MOST_MATCHES
    commutes = form.storage.values.name in COMMUTING
    return few and commutes and jax.tree.leaves(error)[0].size > _WHOLE


def feed(
    form: Any, error: Any, pieces: Any, accept: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Return rounded values and offsets of a row, and the error less them.

    Part follows part: each needs a sum with the gradient in float32.
    """
    units, unit, made = len(jax.tree.leaves(error)[0]), form.size * form.lanes, []
    chunk = -(-units // min(_PARTS, -(-units * unit // _LEAST)))
    # Traced once for parts of one size.
    step = jax.jit(functools.partial(reference.fed, form, form.residual))
    for first in range(0, units, chunk):
        number, at = min(chunk, units - first), at_run_time(first)
        added = section(pieces, first * unit, number * unit)
        cut = lambda x, at=at, n=number: lax.dynamic_slice_in_dim(x, at, n)
        row, rest = step(jax.tree.map(cut, error), added, accept, count, at)
        put = lambda x, y, at=at: lax.dynamic_update_slice_in_dim(x, y, at, axis=0)
        error = jax.tree.map(put, error, rest)
        made.append(row)
    values, offsets = map(jnp.concatenate, zip(*made, strict=True))
    return values, offsets, error


def inner(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    if not form.tile:
        blocks = lambda *at: form.place(*part(row, *at))
        return _gathered(form, window, blocks, row.values.dtype)
    if form.kept > MOST_MATCHES:
        return dot(form, window, _spread(form, *row))
    values, offsets = form.storage.load(window, row.values.dtype)
    return by_row(form, matched(values, offsets, row))


def matched(values: jax.Array, offsets: jax.Array, row: SparseRow) -> jax.Array:
    """Return every value of a window times the one of `row` at the same place, or 0."""
    at = jnp.zeros((), row.values.dtype)
    for i in range(row.values.shape[-2]):
        value, offset = (x[..., i : i + 1, :] for x in row)
        # A sum, so that entries of value 0 may share a place with another.
        at = at + jnp.where(offsets == offset, value, 0)
    return values * at


def by_row(form: Any, products: jax.Array) -> jax.Array:
    """Return the sum of the products of each row of a window, `(m,)`."""
    total = jnp.sum(products, axis=(0, 2)[: products.ndim - 1])
    return jnp.sum(total.reshape(-1, form.kept), axis=1)


def _gathered(form: Any, window: Stored, vector: Any, dtype: Any) -> jax.Array:
    """Return products with the entries that `vector(first block, blocks)` returns."""
    blocks, entries = jax.tree.leaves(window)[0].shape

    def add(total: jax.Array, start: Any, chunk: int) -> jax.Array:
        values, offsets = form.storage.load(part(window, start, chunk), dtype)
        at = form.taken(vector(start, chunk), offsets)
        return total + jnp.sum(values * at, axis=0)

    chunk = max(1, min(_GATHERED // entries, indexed(form.size)))
    zeros = vary_like(window, jnp.zeros(entries, dtype))
    total = sweep(blocks, chunk, zeros, add)
    return jnp.sum(total.reshape(-1, form.kept), axis=1)


def compared(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return what `inner` does, by comparing every two entries of a large block."""
    values, offsets = form.storage.load(window, row.values.dtype)
    same = offsets[:, :, None] == row.offsets[:, None, :]
    at = jnp.sum(jnp.where(same, row.values[:, None, :], 0), axis=2)
    return by_row(form, values * at)


def dot(form: Any, window: Stored, vector: jax.Array) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""
    if form.tile:
        return reference.dot(form, window, vector)
    blocks = lambda *at: part(vector, *at).reshape(-1)
    return _gathered(form, window, blocks, vector.dtype)


def combine(
    form: Any, window: Stored, weights: jax.Array, *, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    if not form.tile:
        return reference.cut(_row_by_row(form, window, weights), runs)
    unit, zero = form.size * form.lanes, jnp.zeros_like(weights[0])

    def sums(zero: jax.Array, start: Any, count: int) -> jax.Array:
        some = lambda x: lax.dynamic_slice_in_dim(x, start, count)
        values, offsets = form.storage.load(jax.tree.map(some, window), weights.dtype)
        each = form.per_entry(weights + zero)
        return _spread(form, values * each, offsets).reshape(-1)

    units, entries, *_ = jax.tree.leaves(window)[0].shape
    if units * unit <= _WHOLE:
        return reference.cut(sums(zero, 0, units), runs)
    size = min(_WHOLE, max(_LEAST, units * unit // _ROUNDS))
    chunk = max(1, min(size // unit, _GATHERED // (2 * entries * form.lanes)))
    # Else XLA joins what is done with the leaves of all runs, which then wait for it.
    return write(runs, unit, chunk, sums, zero, copied=True)


def _row_by_row(form: Any, window: Stored, weights: jax.Array) -> jax.Array:
    def add(i: Any, total: jax.Array) -> jax.Array:
        one = lambda x: lax.dynamic_slice_in_dim(x, i * form.kept, form.kept, axis=1)
        row = jax.tree.map(one, window)
        values, offsets = form.storage.load(row, weights.dtype)
        return reference.residual(form, total, -weights[i] * values, offsets)

    blocks = len(jax.tree.leaves(window)[0])
    zeros = vary_like(window, jnp.zeros((blocks, form.size), weights.dtype))
    return lax.fori_loop(0, len(weights), add, zeros)


def by_digits(form: Any, window: Stored, weights: jax.Array) -> jax.Array:
    """Return the sum of rows of large blocks, end to end, by products of matrices.

    An offset is a number of two digits. What says which entry has which first digit,
    times what says which has which second one and how much, is the sum.
    """
    blocks, entries = jax.tree.leaves(window)[0].shape
    most = indexed(form.size)
    if blocks > most:
        some = lambda i: jax.tree.map(lambda x: x[i : i + most], window)
        sums = [by_digits(form, some(i), weights) for i in range(0, blocks, most)]
        return jnp.concatenate(sums)
    low = 2 ** math.ceil(math.log2(form.size) / 2)
    high = -(-form.size // low)

    def write(out: jax.Array, start: Any, chunk: int) -> jax.Array:
        values, offsets = form.storage.load(part(window, start, chunk), weights.dtype)
        digits = lambda n: lax.broadcasted_iota(jnp.uint32, (1, 1, n), 2)
        offsets = offsets.astype(jnp.uint32)[:, :, None]
        first, second = offsets // low == digits(high), offsets % low == digits(low)
        weighted = (values * form.per_entry(weights))[:, :, None]
        weighted = jnp.where(second, weighted, 0)
        sums = contract("bnh,bnl->bhl", first.astype(weights.dtype), weighted)
        sums = sums.reshape(chunk, -1)[:, : form.size].reshape(-1)
        return lax.dynamic_update_slice_in_dim(out, sums, start * form.size, axis=0)

    zeros = vary_like(window, jnp.zeros(blocks * form.size, weights.dtype))
    return sweep(blocks, max(1, _MULTIPLIED // entries), zeros, write)


def _spread(form: Any, values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return the vector in tiles that entries add up to, by comparison."""
    at = lax.broadcasted_iota(offsets.dtype, (1, 1, form.size, 1), 2)
    here = offsets[:, :, None] == at
    return jnp.sum(jnp.where(here, values[:, :, None], 0), axis=1)

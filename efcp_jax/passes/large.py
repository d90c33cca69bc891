"""Passes over blocks of more than 256 entries on accelerators.

Each sum is in one fixed order: GPUs scatter row after row, whose entries lie at places
of their own; TPUs, slow at gathers and scatters, compare offsets and multiply.
"""

import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax import varying
from efcp_jax.devices.sections import part, sweep
from efcp_jax.numerics import indexed
from efcp_jax.passes import reference
from efcp_jax.passes.entries import SparseRow, Stored
from efcp_jax.passes.places import place, taken


# Entries of a window gathered at a time, to keep all cores busy, and of one of which
# sums are made at a time by products.
_GATHERED = 1 << 24
_MULTIPLIED = 1 << 20


def inner(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`, by gathers."""
    blocks, entries = _shape(window)

    def add(total: jax.Array, start: Any, chunk: int) -> jax.Array:
        values, offsets = form.storage.load(part(window, start, chunk), total.dtype)
        vector = place(form, *part(row, start, chunk))
        return total + jnp.sum(values * taken(form, vector, offsets), axis=0)

    chunk = max(1, min(_GATHERED // entries, indexed(form.size)))
    zeros = varying.like(window, jnp.zeros(entries, row.values.dtype))
    total = sweep(blocks, chunk, zeros, add)
    return jnp.sum(total.reshape(-1, form.kept), axis=1)


def compared(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return what `inner` does, by comparing every two entries of a block."""
    values, offsets = form.storage.load(window, row.values.dtype)
    same = offsets[:, :, None] == row.offsets[:, None, :]
    at = jnp.sum(jnp.where(same, row.values[:, None, :], 0), axis=2)
    total = jnp.sum(values * at, axis=0)
    return jnp.sum(total.reshape(-1, form.kept), axis=1)


def dot(form: Any, window: Stored, vector: jax.Array) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector, row by row."""
    one = lambda slot: reference.dot(form, _row(form, window, slot), vector)[0]
    rows = _shape(window)[1] // form.kept
    return lax.map(one, jnp.arange(rows, dtype=jnp.int32))


def combine(
    form: Any, window: Stored, weights: jax.Array, *, runs: Any, sums: Any = None
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves.

    Of its blocks as many are taken at once as indices reach.
    """
    most, count = indexed(form.size), _shape(window)[0]
    some = lambda first: jax.tree.map(lambda x: x[first : first + most], window)
    parts = [
        (sums or _row_by_row)(form, some(first), weights)
        for first in range(0, count, most)
    ]
    return reference.cut(jnp.concatenate(parts), runs)


def _row_by_row(form: Any, window: Stored, weights: jax.Array) -> jax.Array:
    def add(i: Any, total: jax.Array) -> jax.Array:
        row = _row(form, window, i)
        values, offsets = form.storage.load(row, weights.dtype)
        return place(form, values * weights[i], offsets, total)

    zeros = jnp.zeros(_shape(window)[0] * form.size, weights.dtype)
    return lax.fori_loop(0, len(weights), add, varying.like(window, zeros))


def by_digits(form: Any, window: Stored, weights: jax.Array) -> jax.Array:
    """Return the sum of rows, laid end to end, by products of matrices.

    An offset is a number of two digits. What says which entry has which first digit,
    times what says which has which second one and how much, is the sum.
    """
    blocks, entries = _shape(window)
    low = 2 ** math.ceil(math.log2(form.size) / 2)
    high = -(-form.size // low)

    def write(out: jax.Array, start: Any, chunk: int) -> jax.Array:
        values, offsets = form.storage.load(part(window, start, chunk), weights.dtype)
        digits = lambda n: lax.broadcasted_iota(jnp.uint32, (1, 1, n), 2)
        offsets = offsets.astype(jnp.uint32)[:, :, None]
        first, second = offsets // low == digits(high), offsets % low == digits(low)
        weighted = (values * form.per_entry(weights))[:, :, None]
        sums = jnp.einsum(
            "bnh,bnl->bhl",
            first.astype(weights.dtype),
            jnp.where(second, weighted, 0),
            precision=lax.Precision.HIGHEST,
        )
        sums = sums.reshape(chunk, -1)[:, : form.size].reshape(-1)
        return lax.dynamic_update_slice_in_dim(out, sums, start * form.size, axis=0)

    zeros = varying.like(window, jnp.zeros(blocks * form.size, weights.dtype))
    return sweep(blocks, max(1, _MULTIPLIED // entries), zeros, write)


def _row(form: Any, window: Stored, slot: Any) -> Stored:
    some = lambda x: lax.dynamic_slice_in_dim(x, slot * form.kept, form.kept, axis=1)
    return jax.tree.map(some, window)


def _shape(window: Stored) -> tuple[int, ...]:
    """Return the numbers of blocks, and of entries of all rows of a block."""
    return jax.tree.leaves(window)[0].shape

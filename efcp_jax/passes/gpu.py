"""Passes over small blocks on GPUs: fused comparisons, each sum in one fixed order.

A scattered addition of floats would use atomics, whose order differs from run to run.
Comparing each entry with every place of its block takes no temporary, and less time
than the bytes of the window while the window has a few hundred rows.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax import varying
from efcp_jax.numerics import indexed
from efcp_jax.passes import reference
from efcp_jax.passes.entries import SparseRow, Stored, Tiled
from efcp_jax.passes.matching import (
    MOST_MATCHES,
    by_row,
    combine as combine,
    matched,
    residual as residual,
    select as select,
    spread,
)
from efcp_jax.passes.places import chunk_products, in_reach, place, shape
from efcp_jax.passes.runs import sweep


# Entries of a window of large blocks gathered at a time, to keep all cores busy.
_INNER = 1 << 24


def inner(window: Tiled, row: SparseRow, *, size: int) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    kept = row.values.shape[1]
    if kept > MOST_MATCHES:
        return dot(window, spread(row, size), kept=kept)
    return by_row(matched(window, row), kept)


def dot(window: Tiled, vector: jax.Array, *, kept: int) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""
    lanes = window.values.shape[2]
    offsets = reference.from_tiles(window.offsets).astype(jnp.uint32)
    taken = jnp.take_along_axis(vector, offsets, axis=1, mode="promise_in_bounds")
    return by_row(window.load(vector.dtype) * reference.to_tiles(taken, lanes), kept)


def inner_large(window: Stored, row: SparseRow, *, form: Any) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    count, entries = shape(window)
    products = functools.partial(chunk_products, form, window, row)
    add = lambda total, start, chunk: total + jnp.sum(products(start, chunk), axis=0)
    chunk = max(1, min(_INNER // entries, indexed(form.size)))
    zeros = varying.like(window, jnp.zeros(entries, row.values.dtype))
    total = sweep(count, chunk, zeros, add)
    return jnp.sum(total.reshape(-1, form.kept), axis=1)


def combine_large(
    window: Stored, weights: jax.Array, *, form: Any, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""

    def sums(window: Stored) -> jax.Array:
        def add(i: Any, total: jax.Array) -> jax.Array:
            slot = lambda leaf: lax.dynamic_slice_in_dim(
                leaf, i * form.kept, form.kept, axis=1
            )
            row = form.storage.load(jax.tree.map(slot, window), weights.dtype)
            return place(form.size, row[1], row[0] * weights[i], total)

        zeros = jnp.zeros(shape(window)[0] * form.size, weights.dtype)
        return lax.fori_loop(0, len(weights), add, varying.like(window, zeros))

    return reference.cut(in_reach(window, form.size, sums), runs)

"""Passes on GPUs: fused comparisons, each sum in one fixed order.

A scattered addition of floats would use atomics, whose order differs from run to run.
Comparing each entry with every place of a small block takes no temporary, and less time
than the bytes of the window while the window has a few hundred rows.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.passes import large, reference, selection
from efcp_jax.passes.entries import SparseRow, Stored
from efcp_jax.passes.places import MOST_MATCHES, matched


def select(form: Any, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the entries of largest magnitude of every block."""
    return selection.select(form, vector, MOST_MATCHES)


def residual(
    form: Any, vector: jax.Array, values: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Return `vector` less the `values` at their places."""
    if not form.tile:
        return reference.residual(form, vector, values, offsets)
    return vector - _spread(form, values, offsets)


def inner(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    if not form.tile:
        return large.inner(form, window, row)
    if form.kept > MOST_MATCHES:
        return dot(form, window, _spread(form, *row))
    values, offsets = form.storage.load(window, row.values.dtype)
    return by_row(form, matched(values, offsets, row))


def dot(form: Any, window: Stored, vector: jax.Array) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""
    return (reference if form.tile else large).dot(form, window, vector)


def combine(
    form: Any, window: Stored, weights: jax.Array, *, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    if not form.tile:
        return large.combine(form, window, weights, runs=runs)
    values, offsets = form.storage.load(window, weights.dtype)
    sums = _spread(form, values * form.per_entry(weights), offsets)
    return reference.cut(sums, runs)


def by_row(form: Any, products: jax.Array) -> jax.Array:
    """Return the sum of the products of each row, `(tiles, m k, lanes)` to `(m,)`."""
    return jnp.sum(jnp.sum(products, axis=(0, 2)).reshape(-1, form.kept), axis=1)


def _spread(form: Any, values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return the blocks `(blocks, size)` that entries add up to, by comparison."""
    at = lax.broadcasted_iota(offsets.dtype, (1, 1, 1, form.size), 3)
    here = offsets[..., None] == at
    blocks = jnp.sum(jnp.where(here, values[..., None], 0), axis=1)
    return blocks.reshape(-1, form.size)

"""The passes over sparse rows, as plainly as they can be written.

This is what `cpu`, `gpu` and `tpu` must compute, and the form of all other platforms.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from efcp_jax.passes.entries import SparseRow, Stored
from efcp_jax.passes.selection import magnitudes


def select(form: Any, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the entries of largest magnitude of every block."""
    order = jnp.argsort(-magnitudes(vector), axis=1, stable=True)
    offsets = jnp.sort(order[:, : form.kept], axis=1).astype(jnp.int32)
    return take(form, vector, form.from_blocks(offsets))


def take(form: Any, vector: jax.Array, offsets: jax.Array) -> tuple[Any, Any]:
    """Return the values of `vector` at `offsets` of a row, and `offsets`."""
    values = jnp.take_along_axis(vector, form.blocks(offsets), axis=1)
    return form.from_blocks(values), offsets


def residual(
    form: Any, vector: jax.Array, values: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Return `vector` less the `values` at their places, which are of one row."""
    # In reach: nothing is compared with the ends of a block.
    return _at(form, vector, offsets).add(
        -form.blocks(values), mode="promise_in_bounds", unique_indices=True
    )


def inner(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    return dot(form, window, _scatter(form, *row))


def dot(form: Any, window: Stored, vector: jax.Array) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""
    values, offsets = map(form.blocks, form.storage.load(window, vector.dtype))
    places = offsets.astype(jnp.uint32)
    taken = jnp.take_along_axis(vector, places, axis=1, mode="promise_in_bounds")
    products = (values * taken).reshape(len(vector), -1, form.kept)
    return jnp.sum(products, axis=(0, 2))


def combine(
    form: Any, window: Stored, weights: jax.Array, *, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    values, offsets = form.storage.load(window, weights.dtype)
    return cut(_scatter(form, values * form.per_entry(weights), offsets), runs)


def cut(blocks: jax.Array, runs: Any) -> list[jax.Array]:
    """Return the leaves of `runs` from the entries of `blocks`, laid end to end."""
    sizes = [size for run in runs for size in run]
    return jnp.split(blocks.reshape(-1), list(itertools.accumulate(sizes)))[:-1]


def _scatter(form: Any, values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return the blocks that entries add up to."""
    zeros = jnp.zeros((values.size // values.shape[1], form.size), values.dtype)
    return _at(form, zeros, offsets).add(form.blocks(values))


def _at(form: Any, vector: jax.Array, offsets: jax.Array) -> Any:
    # Of signed integers: TPUs scatter by unsigned ones with a copy of the vector more.
    block = jnp.arange(len(vector), dtype=jnp.int32)[:, None]
    return vector.at[block, form.blocks(offsets).astype(jnp.int32)]

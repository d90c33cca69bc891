"""The passes over sparse rows, as plainly as they can be written.

This is what `cpu`, `gpu` and `tpu` must compute, and the form of all other platforms.
"""

from collections.abc import Callable
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from efcp_jax import quantized
from efcp_jax.numerics import saturate
from efcp_jax.passes.entries import SparseRow, Stored
from efcp_jax.passes.selection import magnitudes


def select(form: Any, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the entries of largest magnitude of every block."""
    order = jnp.argsort(-magnitudes(vector), axis=1, stable=True)
    offsets = jnp.sort(order[:, : form.kept], axis=1).astype(jnp.int32)
    return jnp.take_along_axis(vector, offsets, axis=1), offsets


def residual(
    form: Any, vector: jax.Array, values: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Return `vector` less the `values` at their places, which are of one row."""
    del form
    # In reach: nothing is compared with the ends of a block.
    return _at(vector, offsets).add(
        -values, mode="promise_in_bounds", unique_indices=True
    )


def fed(
    form: Any,
    less: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    old: Any,
    added: jax.Array,
    new: jax.Array,
    count: jax.Array,
    start: jax.Array,
    held: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Return a rounded part of a row, and what is left of an error plus `added`.

    They are of the units from `start` on, of which those that are `new` are fed; `less`
    is the residual. A scale for the row can be found behind the last part.
    """
    before = quantized.load(old, added.dtype)
    fresh = jnp.where(new, added.reshape(before.shape), 0)
    total = held(saturate(before + fresh, added.dtype))
    values, offsets = form.select(total)
    values = form.storage.near(values, offsets)
    rest = less(total, jnp.where(new, values, 0), offsets)
    return (values, offsets), quantized.store(rest, old, new, count, start)


def inner(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    return dot(form, window, _scatter(form, *row))


def dot(form: Any, window: Stored, vector: jax.Array) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""
    values, offsets = form.storage.load(window, vector.dtype)
    places = offsets.astype(jnp.uint32)
    taken = jnp.take_along_axis(vector, places, axis=1, mode="promise_in_bounds")
    products = (values * taken).reshape(len(vector), -1, form.kept * form.lanes)
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
    zeros = jnp.zeros(form.shape(len(values), form.size), values.dtype)
    return _at(zeros, offsets).add(values)


def _at(vector: jax.Array, offsets: jax.Array) -> Any:
    # Of signed integers: TPUs scatter by unsigned ones with a copy of the vector more.
    index = [*jnp.indices(offsets.shape, jnp.int32, sparse=True)]
    index[1] = offsets.astype(jnp.int32)
    return vector.at[tuple(index)]

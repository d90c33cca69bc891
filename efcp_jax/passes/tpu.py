"""Passes over sparse rows on TPUs: registers are compared, nothing is gathered.

A tile is 128 blocks, one a lane of a register. Entries are found by comparing offsets,
with one another or with all entries of a block. Where XLA moves no more than it must,
its form is used; the others are kernels, for tiles of 128 blocks. Models of fewer
blocks are one tile of them, all left to XLA.

Where m k is a multiple of 8, XLA keeps windows in the order in which kernels read them;
any other window is copied before a kernel reads it.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax import varying
from efcp_jax.experimental import pltpu
from efcp_jax.passes import (
    matching,
    reference,
    tpu_add,
    tpu_inner,
    tpu_select,
    tpu_tiles,
)
from efcp_jax.passes.entries import ScaledRow, SparseRow, Stored, Tiled
from efcp_jax.passes.places import in_reach, shape
from efcp_jax.passes.runs import part, sweep
from efcp_jax.passes.scaled import COMMUTING
from efcp_jax.passes.tpu_feed import feed as feed
from efcp_jax.passes.tpu_tiles import LANES
from efcp_jax.quantized import Quantized


# Entries of a window of large blocks that are summed at a time.
_COMBINE = 1 << 20


def select(vector: jax.Array, *, kept: int, lanes: int) -> tuple[jax.Array, jax.Array]:
    """Return the entries of largest magnitude of every block; see `tiles`."""
    if kept == vector.shape[1]:
        values = reference.to_tiles(vector, lanes)
        return values, lax.broadcasted_iota(jnp.int32, values.shape, 1)
    if tpu_tiles.fits(vector, lanes):
        return tpu_select.select(vector, kept)
    return matching.select(vector, kept=kept, lanes=lanes)


def residual(vector: jax.Array, values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return `vector` less the `values` at their places."""
    if tpu_tiles.fits(vector, values.shape[2]):
        weights = jnp.full(1, -1, vector.dtype)
        return tpu_add.add(values, offsets, weights, vector.shape[1], vector)
    return matching.residual(vector, values, offsets)


def inner(window: Tiled, row: SparseRow, *, size: int) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    del size
    if tpu_tiles.fits(row.values, window.values.shape[2]):
        scales = _scales(window, row.values.dtype)
        stored = window.values, window.offsets
        products = tpu_inner.inner(*stored, *row, scales=scales)
    else:
        products = jnp.sum(matching.matched(window, row), axis=(0, 2))
    return jnp.sum(products.reshape(-1, row.values.shape[1]), axis=1)


def dot(window: Tiled, vector: jax.Array, *, kept: int) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""
    size = vector.shape[1]
    blocks = reference.to_tiles(vector, window.values.shape[2])
    places = lax.broadcasted_iota(window.offsets.dtype, (1, 1, size, 1), 2)
    here = window.offsets[:, :, None] == places
    taken = jnp.sum(jnp.where(here, blocks[:, None], 0), axis=2)
    return matching.by_row(window.load(vector.dtype) * taken, kept)


def combine(
    window: Tiled, weights: jax.Array, *, size: int, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    if not tpu_tiles.fits(weights, window.values.shape[2]):
        return matching.combine(window, weights, size=size, runs=runs)
    scales = _scales(window, weights.dtype)
    stored = window.values, window.offsets
    blocks = tpu_add.add(*stored, weights, size, scales=scales)
    leaves = reference.cut(blocks, runs)
    if len(leaves) == 1:  # can be cut by what is done with it next
        return leaves
    # Else XLA would give the whole vector the shape of each kind of leaf in turn.
    return lax.optimization_barrier(leaves)


def feeds(error: Any, dtype: np.dtype, lanes: int) -> bool:
    """Return whether `feed` takes this error and values of `dtype`."""
    if isinstance(error, Quantized):
        # Bytes are turned where the entries of a block fill lanes.
        fits = error.values.shape[1] % LANES == 0
    else:
        fits = error.dtype.name in ("float32", "bfloat16")
    fits = fits and pltpu is not None and dtype.name in COMMUTING
    return fits and lanes == LANES


def _scales(window: Tiled, dtype: np.dtype) -> jax.Array | None:
    """Return the scale of each entry of each tile, if there are any."""
    return window.per_entry(dtype) if isinstance(window, ScaledRow) else None


def inner_large(window: Stored, row: SparseRow, *, form: Any) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""
    values, offsets = form.storage.load(window, row.values.dtype)
    same = offsets[:, :, None] == row.offsets[:, None, :]
    at = jnp.sum(jnp.where(same, row.values[:, None, :], 0), axis=2)
    total = jnp.sum(values * at, axis=0)
    return jnp.sum(total.reshape(-1, form.kept), axis=1)


def combine_large(
    window: Stored, weights: jax.Array, *, form: Any, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    # An offset is a number of two digits. What says which entry has which first digit,
    # times what says which has which second one and how much, is the sum.
    entries = shape(window)[1]
    each = jnp.repeat(weights, form.kept)
    low = 2 ** math.ceil(math.log2(form.size) / 2)
    high = -(-form.size // low)

    def write_sums(window: Stored, out: jax.Array, start: Any, chunk: int):
        values, offsets = form.storage.load(part(window, start, chunk), weights.dtype)
        digits = lambda n: lax.broadcasted_iota(jnp.uint32, (1, 1, n), 2)
        first = (offsets // low)[:, :, None] == digits(high)
        second = (offsets % low)[:, :, None] == digits(low)
        sums = jnp.einsum(
            "bnh,bnl->bhl",
            first.astype(weights.dtype),
            jnp.where(second, (values * each[None])[:, :, None], 0),
            precision=lax.Precision.HIGHEST,
        )
        sums = sums.reshape(chunk, -1)[:, : form.size].reshape(-1)
        return lax.dynamic_update_slice_in_dim(out, sums, start * form.size, axis=0)

    def sums(window: Stored) -> jax.Array:
        count = shape(window)[0]
        out = varying.like(window, jnp.zeros(count * form.size, weights.dtype))
        step = functools.partial(write_sums, window)
        return sweep(count, max(1, _COMBINE // entries), out, step)

    return reference.cut(in_reach(window, form.size, sums), runs)

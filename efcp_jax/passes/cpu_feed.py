"""Error feedback of sparse rows on CPUs, some blocks after others.

An error of less than 32 bits is widened, added to, selected from and rounded again a
few blocks at a time, and written where it lies. In passes over the whole of it, it
would be a vector of float32 in between.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax import quantized, varying
from efcp_jax.devices.sections import part, sweep
from efcp_jax.numerics import indexed, saturate
from efcp_jax.passes.entries import COMMUTING


# Entries of a round: XLA writes half precision several times slower in smaller parts.
_ENTRIES = 1 << 20

# A gradient of many leaves has as many branches as there are rounds.
_MOST_ROUNDS = 64


def feeds(form: Any, error: Any, dtype: np.dtype) -> bool:
    """Return whether `feed` takes this error, and is worth it."""
    kept = jax.tree.leaves(error)[0]
    units, chunk = _rounds(form, kept.shape)
    narrow = kept.dtype.itemsize < 4 and dtype == jnp.float32
    fits = chunk < units and kept.size <= indexed()
    return narrow and fits and form.storage.values.name in COMMUTING


def feed(
    form: Any, error: Any, sections: Any, accept: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Return rounded values and offsets of a row, and the error less them."""
    blocks, size = jax.tree.leaves(error)[0].shape
    units, chunk = _rounds(form, (blocks, size))
    unit, whole = form.lanes * size, units // chunk * chunk
    reads = {
        n: sections.every([unit * first for first in firsts], unit * n)
        for n, firsts in ((chunk, range(0, whole, chunk)), (units % chunk, [whole]))
        if n
    }

    def step(carry: Any, start: Any, n: int) -> Any:
        old = part(carry[0], start * form.lanes, n * form.lanes)
        gradient = reads[n](start // chunk if n == chunk else 0).reshape(-1, size)
        total = quantized.load(old, jnp.float32)
        total = saturate(total + jnp.where(accept, gradient, 0), jnp.float32)
        values, offsets = form.select(total)
        # A scale for the row can be found behind the last round.
        values = _near(form, values, offsets)
        rest = form.residual(total, jnp.where(accept, values, 0), offsets)
        rest = quantized.store(rest, old, accept, count, start * form.lanes)
        # Computed on all cores before it is written, which is done on one.
        rest = lax.optimization_barrier(rest)

        def write(array: jax.Array, new: jax.Array) -> jax.Array:
            at = start * (len(new) // n)
            return lax.dynamic_update_slice_in_dim(array, new, at, axis=0)

        return jax.tree.map(write, carry, (rest, values, offsets))

    shape = form.row_shape(blocks)
    row = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
    start = varying.like((error, accept), (error, *row))
    error, *row = sweep(units, chunk, start, step)
    return *row, error


def _near(form: Any, values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return the values that are stored for a part of a row, within their range."""
    if form.storage.scaled:
        return form.storage.load(form.storage.store(values, offsets), jnp.float32)[0]
    return saturate(values, form.storage.values).astype(jnp.float32)


def _rounds(form: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return how many units of `form.lanes` blocks there are, and those of a round."""
    blocks, size = shape
    units = blocks // form.lanes
    chunk = max(1, _ENTRIES // (form.lanes * size), -(-units // _MOST_ROUNDS))
    return units, min(chunk, units)

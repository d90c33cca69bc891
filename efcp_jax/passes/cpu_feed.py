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
from efcp_jax.devices.sections import part
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
    lanes, (units, chunk) = form.lanes, _rounds(form, (blocks, size))
    # The last round begins early enough to be as long as the others: another length
    # would be another program, whose gradient is read ahead.
    firsts = [min(i, units - chunk) for i in range(0, units, chunk)]
    read = sections([lanes * size * i for i in firsts], lanes * size * chunk)

    def step(i: jax.Array, carry: Any) -> Any:
        start = jnp.minimum(i * chunk, units - chunk)

        def fresh(array: jax.Array) -> jax.Array:
            """Return for each line whether it is of this round, not of the last."""
            line = jnp.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1))
            return line >= (i * chunk - start) * (len(array) // chunk)

        old = part(carry[0], start * lanes, chunk * lanes)
        before = quantized.load(old, jnp.float32)
        new = fresh(before) & accept
        gradient = jnp.where(new, read(i).reshape(-1, size), 0)
        total = saturate(before + gradient, jnp.float32)
        values, offsets = form.select(total)
        # A scale for the row can be found behind the last round.
        values = _near(form, values, offsets)
        left = jnp.where(fresh(values) & accept, values, 0)
        rest = form.residual(total, left, offsets)
        rest = quantized.store(rest, old, new, count, start * lanes)
        # Computed on all cores before it is written, which is done on one.
        rest = lax.optimization_barrier(rest)

        def write(array: jax.Array, x: jax.Array) -> jax.Array:
            at = start * (len(x) // chunk)
            return lax.dynamic_update_slice_in_dim(array, x, at, axis=0)

        def fill(row: jax.Array, x: jax.Array) -> jax.Array:
            held = lax.dynamic_slice_in_dim(row, start, len(x))
            return write(row, jnp.where(fresh(x), x, held))

        error, *row = carry
        error = jax.tree.map(write, error, rest)
        return error, *map(fill, row, (values, offsets))

    shape = form.row_shape(blocks)
    row = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
    start = varying.like((error, accept), (error, *row))
    error, *row = lax.fori_loop(0, len(firsts), step, start)
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

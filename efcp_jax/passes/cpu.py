"""Passes on CPUs: loops over blocks that stay in the cache.

What is touched in one round is a few blocks, so that temporaries are small, and sums
are taken entry by entry, which vectorises. XLA's scattered addition takes 2 to 3 ns an
entry here, a comparison with every place of a small block fifty times that.

So is an error added to, selected from and rounded again, one tile after the other: in
passes over the whole of it, each would read and write memory, and one of less than 32
bits would be a vector of float32 in between.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.devices.collectives import vary_like
from efcp_jax.devices.sections import part, reader, sweep, write, zero_after
from efcp_jax.numerics import indexed
from efcp_jax.passes import selection
from efcp_jax.passes.entries import COMMUTING, SparseRow, Stored
from efcp_jax.passes.gpu import MOST_MATCHES, matched
from efcp_jax.passes.reference import fed, residual as residual


# Rounds of maxima that take less time than a bisection.
_MOST_MAXIMA = 16

# Entries of the window of one round. XLA spreads sums over cores from 128 thousand
# entries on; scattered additions run on one core and are best inside its cache.
_INNER = 3 << 16
_COMBINE = 1 << 12

# Rounds that a sum is worth to be set up for.
_FEWEST_ROUNDS = 8

# Entries of a round of `feed`, whose gradient is read at once; more where there would
# be too many rounds: each has a branch of its own, to be traced and compiled.
_ENTRIES = 1 << 18
_MOST_ROUNDS = 20


select = functools.partial(
    selection.select, rounds=_MOST_MAXIMA, first=selection.first_largest
)


def inner(form: Any, window: Stored, row: SparseRow) -> jax.Array:
    """Return the inner products of the rows of `window` with `row`."""

    def products(values: jax.Array, offsets: jax.Array, start: Any, chunk: int):
        newest = part(row, start, chunk)
        if form.tile and form.kept <= MOST_MATCHES:
            return matched(values, offsets, newest)
        return values * form.taken(form.place(*newest), offsets)

    return _summed(form, window, products, row.values.dtype)


def dot(form: Any, window: Stored, vector: jax.Array) -> jax.Array:
    """Return the inner products of the rows of `window` with a vector."""

    def products(values: jax.Array, offsets: jax.Array, start: Any, chunk: int):
        return values * form.taken(part(vector, start, chunk).reshape(-1), offsets)

    return _summed(form, window, products, vector.dtype)


def _summed(form: Any, window: Stored, products: Any, dtype: Any) -> jax.Array:
    """Return the sum for each row of `products(values, offsets, first unit, units)`."""
    units, *shape = jax.tree.leaves(window)[0].shape

    def of(start: Any, chunk: int) -> jax.Array:
        values, offsets = form.storage.load(part(window, start, chunk), dtype)
        return products(values, offsets, start, chunk)

    # A sum over blocks and then over entries takes three times as long as one of both.
    rows = lambda x: x.reshape(len(x), -1, form.kept * form.lanes)
    by_row = lambda x: jnp.sum(rows(x), axis=(0, 2))
    # Sums of whole chunks, entry by entry, are vectorised. A sum along a row would
    # wait for each addition.
    add = lambda total, start, chunk: total + of(start, chunk)
    chunk = _INNER // (shape[0] * form.lanes)
    most = min(units // _FEWEST_ROUNDS, indexed(form.size * form.lanes))
    chunk = max(1, min(chunk, most))
    whole = units // chunk * chunk
    zeros = vary_like(window, jnp.zeros((chunk, *shape), dtype))
    total = by_row(sweep(whole, chunk, zeros, add))
    return total + by_row(of(whole, units - whole)) if whole < units else total


def combine(
    form: Any, window: Stored, weights: jax.Array, *, runs: Any
) -> list[jax.Array]:
    """Return the sum of the rows of `window` times `weights`, cut into leaves."""
    each, unit = form.per_entry(weights), form.lanes * form.size

    def sums(_: jax.Array, start: Any, chunk: int) -> jax.Array:
        values, offsets = form.storage.load(part(window, start, chunk), weights.dtype)
        index = form.positions(offsets).reshape(-1)
        zeros, added = jnp.zeros(chunk * unit, weights.dtype), (values * each).ravel()
        return zeros.at[index].add(added, mode="promise_in_bounds")

    entries = len(weights) * form.kept * form.lanes
    chunk = max(1, min(_COMBINE // entries, indexed(unit)))
    # Begun when the weights are known: zeros that wait for nothing are made early, and
    # held for the whole step.
    return write(runs, unit, chunk, sums, zero_after(weights))


def feeds(form: Any, error: Any, dtype: np.dtype) -> bool:
    """Return whether `feed` takes this error, and is worth it."""
    kept = jax.tree.leaves(error)[0]
    units, chunk, few = _rounds(form, kept.shape)
    # Of large blocks only a narrow error, which else would be widened as a whole.
    worth = few < chunk or kept.dtype.itemsize < 4
    fits = chunk < units and kept.size <= indexed() and dtype == jnp.float32
    return worth and fits and form.storage.values.name in COMMUTING


def feed(
    form: Any, error: Any, pieces: Any, accept: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Return rounded values and offsets of a row, and the error less them."""
    kept = jax.tree.leaves(error)[0]
    units, chunk, few = _rounds(form, kept.shape)
    # The last round begins early enough to be as long as the others: another length
    # would be another program, whose gradient is read ahead.
    firsts = [min(i, units - chunk) for i in range(0, units, chunk)]
    unit, less = form.size * form.lanes, functools.partial(_less, form)
    read = reader(pieces, [unit * i for i in firsts], unit * chunk)

    def step(j: jax.Array, carry: Any, i: jax.Array, gradient: jax.Array) -> Any:
        start = jnp.minimum(i * chunk, units - chunk) + j * few
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, few)
        # Read once, so that it can be overwritten.
        old = lax.optimization_barrier(jax.tree.map(cut, carry[0]))
        # Those of the round before are left as they are.
        fresh = start + jnp.arange(few) >= i * chunk
        fresh = fresh.reshape(-1, *[1] * (kept.ndim - 1))
        added = part(gradient, j * few, few)
        given = old, added, fresh & accept, count, start
        # Held, since each of what reads the sum would add anew.
        row, rest = fed(form, less, *given, held=lax.optimization_barrier)
        if few == chunk:
            # Computed on all cores before it is written, which is done on one.
            rest = lax.optimization_barrier(rest)
        write = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, axis=0)
        fill = lambda x, part: write(x, jnp.where(fresh, part, cut(x)))
        error, *rows = carry
        return jax.tree.map(write, error, rest), *map(fill, rows, row)

    def steps(i: jax.Array, carry: Any) -> Any:
        gradient = read(i).reshape(chunk, *kept.shape[1:])
        one = lambda j, carry: step(j, carry, i, gradient)
        return lax.fori_loop(0, chunk // few, one, carry)

    shape = form.shape(units, form.kept)
    row = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
    start = vary_like((error, accept), (error, *row))
    error, *row = lax.fori_loop(0, len(firsts), steps, start)
    return *row, error


def _few(form: Any) -> bool:
    """Return whether rounds over one tile after the other are fastest."""
    return form.tile is not None and form.kept <= _MOST_MAXIMA


def _less(form: Any, tile: jax.Array, values: jax.Array, offsets: jax.Array) -> Any:
    """Return what `residual` does; of a tile, which comparisons leave in the cache."""
    if not _few(form):
        return residual(form, tile, values, offsets)
    # XLA would find them anew for every entry.
    values, offsets = lax.optimization_barrier((values, offsets))
    places = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    for i in range(form.kept):
        here = places == offsets[:, i : i + 1]
        tile -= jnp.where(here, values[:, i : i + 1], 0)
    return tile


def _rounds(form: Any, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return how many units of a vector there are, and those of a round and a step."""
    units = shape[0]
    unit = form.size * form.lanes
    chunk = min(max(1, _ENTRIES // unit, -(-units // _MOST_ROUNDS)), units)
    return units, chunk, 1 if _few(form) else chunk

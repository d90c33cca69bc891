"""Leaves written a few at a time, so that never all of them are copied.

For CPUs, where what is computed in a loop is written where it is wanted: the entries
of one run of leaves are computed into one array, which is cut into its leaves, before
those of the next run are begun. A leaf that is a run by itself is not copied at all.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.numerics import indexed


# From the number of a unit and a count to the entries of that many units, laid end to
# end.
Units = Callable[[Any, int], jax.Array]


def write(
    runs: Sequence[Sequence[int]],
    unit: int,
    chunk: int,
    units: Units,
    zero: jax.Array,
) -> list[jax.Array]:
    """Return the leaves whose entries, laid end to end, are those of `units`.

    Args:
        runs: The sizes of the leaves of every run.
        unit: Entries of a unit.
        chunk: How many units are computed at once.
        units: Computes units; the last one may reach beyond the last leaf.
        zero: A zero like the entries.

    Returns:
        One flat array for each leaf, in order.
    """
    leaves: list[jax.Array] = []
    start = 0
    for sizes in runs:
        ends = np.cumsum(sizes)
        stop = start + int(ends[-1])
        cuts = [*range(start, stop, indexed()), stop]
        parts = [
            _run(low, high, unit, chunk, units, zero)
            for low, high in itertools.pairwise(cuts)
        ]
        pieces = jnp.split(joined(parts), ends[:-1])
        zero = zero_after(zero, *pieces)
        leaves += pieces
        start = stop
    return leaves


def _run(
    start: int, stop: int, unit: int, chunk: int, units: Units, zero: jax.Array
) -> jax.Array:
    """Return the entries `start` to `stop`, begun behind `zero`."""

    def part(number: int, start: int, stop: int) -> jax.Array:
        entries = units(number, 1)
        return entries[start - number * unit : stop - number * unit]

    # Units that lie between start and stop as a whole; parts of the one before them
    # and of the one behind may be left.
    first, last = -(-start // unit), stop // unit
    if first > last:
        return zero + part(last, start, stop)
    out = jnp.broadcast_to(zero, (stop - start,))
    if start < first * unit:
        head = part(first - 1, start, first * unit)
        out = out.at[: len(head)].set(head)
    if last * unit < stop:
        tail = part(last, last * unit, stop)
        out = out.at[len(out) - len(tail) :].set(tail)

    def step(out: jax.Array, at: Any, count: int) -> jax.Array:
        place = at * unit + (first * unit - start)
        entries = units(first + at, count)
        return lax.dynamic_update_slice_in_dim(out, entries, place, axis=0)

    return sweep(last - first, chunk, out, step) if first < last else out


def joined(parts: Sequence[jax.Array]) -> jax.Array:
    """Return arrays laid end to end: nothing is copied if there is one."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def sweep(
    count: int,
    chunk: int,
    start: Any,
    step: Callable[[Any, Any, int], Any],
) -> Any:
    """Fold `step(carry, first unit, number of units)` over `count` units."""
    chunk = max(1, min(chunk, count))
    whole = count // chunk
    carry = lax.fori_loop(
        0, whole, lambda i, carry: step(carry, i * chunk, chunk), start
    )
    if count % chunk:
        carry = step(carry, whole * chunk, count % chunk)
    return carry


def part(tree: Any, start: Any, chunk: int) -> Any:
    """Return `chunk` entries of every array of `tree` along its first axis."""
    # Without a barrier that depends on the round, XLA on CPUs would hoist the
    # conversion of bfloat16 out of the loop: a float32 window.
    tree, _ = lax.optimization_barrier((tree, start))
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, chunk), tree)


def zero_after(*arrays: jax.Array) -> jax.Array:
    """Return a zero that can only be computed from all of `arrays`."""
    # No compiler finds out that the lowest bit is never below zero.
    firsts = jnp.stack([array.reshape(-1)[0] for array in arrays if array.size])
    bits = lax.bitcast_convert_type(firsts, f"int{8 * firsts.dtype.itemsize}")
    return jnp.minimum(jnp.min(bits & 1), 0).astype(firsts.dtype)

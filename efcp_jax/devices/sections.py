"""Leaves laid end to end, read and written some at a time, on CPUs and GPUs.

A section is read where its leaf lies: no array as long as the model is made to lay
leaves side by side, or to widen them. Leaves are written a run of them at a time, so
that never all of them are copied.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.numerics import indexed


# Entries laid end to end: how many, and what makes those from one number to another. It
# calls a function with what it has computed, before it is laid flat.
Piece: TypeAlias = tuple[int, Callable[[int, int, Callable[[Any], Any]], jax.Array]]


def piece_of(array: jax.Array, dtype: np.dtype | None = None) -> Piece:
    """Return a flat array as a piece, widened to `dtype` where it is read."""
    return len(array), lambda low, high, _: array[low:high].astype(dtype or array.dtype)


def section(
    pieces: Sequence[Piece], start: int, size: int, held: Any = lambda x: x
) -> jax.Array:
    """Return `size` entries of `pieces`, laid end to end, and zeros behind them."""
    made, begin = [], 0
    for length, cut in pieces:
        low, high = max(start - begin, 0), min(start + size - begin, length)
        if low < high:
            made.append(cut(low, high, held))
        begin += length
    missing = size - sum(map(len, made))
    dtype = made[0].dtype if made else jnp.float32
    return jnp.concatenate([*made, jnp.zeros(missing, dtype)])


def reader(
    pieces: Sequence[Piece], firsts: Sequence[int], size: int
) -> Callable[[jax.Array], jax.Array]:
    """Return what reads sections, that begin at one of `firsts`, by their numbers.

    Each is put together by a branch of its own.
    """
    # By itself, else XLA on CPUs finds row and column of each number by a division.
    held = lax.optimization_barrier
    branches = [lambda i=i: section(pieces, i, size, held) for i in firsts]
    return lambda i: lax.switch(i, branches)


def sweep(
    count: int, chunk: int, start: Any, step: Callable[[Any, Any, int], Any]
) -> Any:
    """Fold `step(carry, first unit, number of units)` over `count` units."""
    chunk = max(1, min(chunk, count))
    whole, rest = divmod(count, chunk)
    one = lambda i, carry: step(carry, i * chunk, chunk)
    carry = lax.fori_loop(0, whole, one, start)
    return step(carry, whole * chunk, rest) if rest else carry


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


def at_run_time(number: int) -> jax.Array:
    """Return an index that the program is not made for.

    XLA on CPUs compiles what is done at two such places once.
    """
    # Unsigned, so that indexing looks for no negative ones.
    return lax.optimization_barrier(np.uint32(number))


def write(
    runs: Sequence[Sequence[int]],
    unit: int,
    chunk: int,
    units: Callable[[jax.Array, Any, int], jax.Array],
    zero: jax.Array,
    *,
    copied: bool = False,
) -> list[jax.Array]:
    """Return the leaves, flat, whose entries laid end to end are those of `units`.

    These are of `unit` entries each, some from a number on, at most `chunk` at once, of
    a zero that they may wait for; the last one may reach beyond the last leaf. `runs`
    are sizes of leaves. The entries of a run are computed into one array, which is cut
    into its leaves, before those of the next run are begun; if `copied`, whatever is
    done with them next is not joined with the cutting. A leaf that is a run by itself
    is not copied at all.
    """
    leaves: list[jax.Array] = []
    start = 0
    for sizes in runs:
        ends = np.cumsum(sizes)
        stop = start + int(ends[-1])
        # One run at least, of no entries where leaves have none.
        cuts = [*range(start, max(stop, start + 1), indexed()), stop]
        given = unit, chunk, functools.partial(units, zero), zero
        parts = [_run(*between, *given) for between in itertools.pairwise(cuts)]
        whole = jnp.concatenate(parts)
        cut = [whole]
        if len(sizes) > 1:
            pairs = zip(map(at_run_time, (ends - sizes).tolist()), sizes, strict=True)
            cut = [lax.dynamic_slice_in_dim(whole, at, n) for at, n in pairs]
        cut = lax.optimization_barrier(cut) if copied else cut
        zero = zero_after(zero, *(cut if copied else [whole]))
        leaves += cut
        start = stop
    return leaves


def _run(
    start: int, stop: int, unit: int, chunk: int, units: Any, zero: jax.Array
) -> jax.Array:
    """Return the entries `start` to `stop`, begun behind `zero`."""

    def some(number: int, start: int, stop: int) -> jax.Array:
        entries = units(number, 1)
        return entries[start - number * unit : stop - number * unit]

    # Units that lie between start and stop as a whole; parts of the one before them
    # and of the one behind may be left.
    first, last = -(-start // unit), stop // unit
    if first > last:
        return zero + some(last, start, stop)
    out = jnp.broadcast_to(zero, (stop - start,))
    if start < first * unit:
        head = some(first - 1, start, first * unit)
        out = out.at[: len(head)].set(head)
    if last * unit < stop:
        tail = some(last, last * unit, stop)
        out = out.at[len(out) - len(tail) :].set(tail)

    def step(out: jax.Array, at: Any, count: int) -> jax.Array:
        place = at * unit + (first * unit - start)
        entries = units(first + at, count)
        return lax.dynamic_update_slice_in_dim(out, entries, place, axis=0)

    return sweep(last - first, chunk, out, step) if first < last else out

"""Leaves laid end to end, read and written some at a time, by loops on CPUs.

A section is read where its leaf lies: no array as long as the model is made to lay
leaves side by side, or to widen them. Leaves are written a run of them at a time, so
that never all of them are copied.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.numerics import indexed


def reader(
    arrays: Sequence[jax.Array], dtype: np.dtype, firsts: Sequence[int], size: int
) -> Callable[[jax.Array], jax.Array]:
    """Return what reads sections of flat `arrays`, laid end to end, by their numbers.

    Each is of `size` entries of `dtype`, and begins at one of `firsts`; behind the last
    array there are zeros. One inside of an array is cut from it; each of the others is
    put together by a branch of its own. So there are no more branches than sections.
    """
    ends = [0, *np.cumsum([len(x) for x in arrays]).tolist()]

    def inside(index: int, first: jax.Array) -> jax.Array:
        place = first - ends[index]
        return lax.dynamic_slice_in_dim(arrays[index], place, size).astype(dtype)

    def across(start: int, _: jax.Array) -> jax.Array:
        pieces = []
        for array, begin in zip(arrays, ends[:-1], strict=True):
            low, high = max(start - begin, 0), min(start + size - begin, len(array))
            if low < high:
                pieces.append(array[low:high].astype(dtype))
        return jnp.concatenate(
            [*pieces, jnp.zeros(size - sum(map(len, pieces)), dtype)]
        )

    branches: dict[Any, Callable[[jax.Array], jax.Array]] = {}
    chosen = []
    for first in firsts:
        index = int(np.searchsorted(ends, first, side="right")) - 1
        whole = index < len(arrays) and first + size <= ends[index + 1]
        cut, at = (inside, index) if whole else (across, first)
        branches.setdefault((cut, at), functools.partial(cut, at))
        chosen.append(list(branches).index((cut, at)))
    table = np.array([chosen, firsts], np.int32)

    def read(i: jax.Array) -> jax.Array:
        number, first = jnp.asarray(table)[:, i]
        return lax.switch(number, list(branches.values()), first)

    return read


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


def write(
    runs: Sequence[Sequence[int]],
    unit: int,
    chunk: int,
    units: Callable[[Any, int], jax.Array],
    zero: jax.Array,
) -> list[jax.Array]:
    """Return the leaves, flat, whose entries laid end to end are those of `units`.

    These are of `unit` entries each, some from a number on, at most `chunk` at once;
    the last one may reach beyond the last leaf. `runs` are sizes of leaves. The entries
    of a run are computed into one array, which is cut into its leaves, before those of
    the next run are begun. A leaf that is a run by itself is not copied at all.
    """
    leaves: list[jax.Array] = []
    start = 0
    for sizes in runs:
        ends = np.cumsum(sizes)
        stop = start + int(ends[-1])
        # One run at least, of no entries where leaves have none.
        cuts = [*range(start, max(stop, start + 1), indexed()), stop]
        given = unit, chunk, units, zero
        parts = [_run(*between, *given) for between in itertools.pairwise(cuts)]
        pieces = jnp.split(jnp.concatenate(parts), ends[:-1])
        zero = zero_after(zero, *pieces)
        leaves += pieces
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

"""Leaves laid end to end, read and written some at a time.

For loops on CPUs, where what is computed is written where it is wanted. A section is
read where its leaf lies: no array as long as the model is made to lay leaves side by
side, or to widen them. Leaves are written a run of them at a time, so that never all of
them are copied.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any, TypeAlias

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.devices.layout import Layout
from efcp_jax.numerics import indexed


# From the number of a section to its entries.
Read: TypeAlias = Callable[[Any], jax.Array]


class Sections:
    """Arrays laid end to end.

    Args:
        arrays: Of one axis each.
        dtype: In which they are read.
    """

    def __init__(self, arrays: Sequence[jax.Array], dtype: np.dtype):
        self._arrays = arrays
        self._ends = [0, *np.cumsum([len(x) for x in arrays]).tolist()]
        self._dtype = dtype

    @classmethod
    def of(cls, layout: Layout, tree: chex.ArrayTree) -> "Sections":
        """Return the entries of `tree`, all of whose leaves are on this device."""
        given = zip(
            jax.tree.leaves(tree), layout.leaves, layout.matrices(tree), strict=True
        )
        # Widened where they are read, but for complex leaves, whose parts are laid out.
        arrays = [w if leaf.parts == 2 else jnp.asarray(x) for x, leaf, w in given]
        return cls([x.reshape(-1) for x in arrays], layout.dtype)

    def every(self, firsts: Sequence[int], size: int) -> Read:
        """Return what reads one of several sections of `size` entries.

        A section inside one array is cut from it; each of the others is put together by
        a branch of its own. So there are no more branches than sections.

        Args:
            firsts: Where each section begins. Behind the last array there are zeros.
            size: Entries of a section.

        Returns:
            Function from the number of a section to an array `(size,)`.
        """
        reads: list[Read] = []
        numbers: dict[Any, int] = {}
        chosen = []
        for first in firsts:
            index = int(np.searchsorted(self._ends, first, side="right")) - 1
            inside = index < len(self._arrays) and first + size <= self._ends[index + 1]
            key = index if inside else (first,)
            if key not in numbers:
                numbers[key] = len(reads)
                cut = functools.partial(self._inside, index, size)
                across = functools.partial(self._across, first, size)
                reads.append(cut if inside else across)
            chosen.append(numbers[key])
        table = np.array([chosen, firsts], np.int32)

        def read(i: Any) -> jax.Array:
            number, first = jnp.asarray(table)[:, i]
            return lax.switch(number, reads, first)

        return read

    def _inside(self, index: int, size: int, first: jax.Array) -> jax.Array:
        """Return the section that begins at `first` and lies in one array."""
        place = first - self._ends[index]
        piece = lax.dynamic_slice_in_dim(self._arrays[index], place, size)
        return piece.astype(self._dtype)

    def _across(self, start: int, size: int, first: jax.Array) -> jax.Array:
        """Return the section that begins at `start`, which `first` is."""
        del first
        pieces, missing = [], size
        for array, end in zip(self._arrays, self._ends[1:], strict=True):
            begin = end - len(array)
            low, high = max(start, begin), min(start + size, end)
            if low < high:
                pieces.append(array[low - begin : high - begin].astype(self._dtype))
                missing -= high - low
        return jnp.concatenate([*pieces, jnp.zeros(missing, self._dtype)])


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


def write(
    runs: Sequence[Sequence[int]],
    unit: int,
    chunk: int,
    units: Callable[[Any, int], jax.Array],
    zero: jax.Array,
) -> list[jax.Array]:
    """Return the leaves whose entries, laid end to end, are those of `units`.

    The entries of a run are computed into one array, which is cut into its leaves,
    before those of the next run are begun. A leaf that is a run by itself is not
    copied at all.

    Args:
        runs: The sizes of the leaves of every run.
        unit: Entries of a unit.
        chunk: How many units are computed at once.
        units: From the number of a unit and a count to the entries of that many units,
            laid end to end; the last one may reach beyond the last leaf.
        zero: A zero like the entries.

    Returns:
        One flat array for each leaf, in order.
    """
    leaves: list[jax.Array] = []
    start = 0
    for sizes in runs:
        ends = np.cumsum(sizes)
        stop = start + int(ends[-1])
        # One run at least, of no entries where leaves have none.
        cuts = [*range(start, max(stop, start + 1), indexed()), stop]
        parts = [
            _run(low, high, unit, chunk, units, zero)
            for low, high in itertools.pairwise(cuts)
        ]
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

"""The entries of largest magnitude of every block.

A few are found by rounds of maxima, many by bisection on bits, and on TPUs by sorting,
which moves a quarter of what bisection does there; on CPUs it takes three to six times
as long, and on GPUs four times the memory.

A threshold that the k largest reach is found bit by bit; the positions of the entries
that reach it are read off a bit mask by counting set bits. Two levels, first among the
maxima of groups and then among the entries of the groups that are left, make most of
the counting small: one level alone takes five times as long.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.devices.collectives import vary_like


# Below this size of a group the first level does not pay.
_SMALLEST_GROUP = 4

# Groups kept above the number of entries kept: room that lets the search for a
# threshold among the maxima end early.
_SLACK = 1.25

# Bits of a word of a mask, and entries counted together first: XLA on CPUs fuses what
# it reduces into sums of so few.
_WORD = 32


def magnitudes(x: jax.Array) -> jax.Array:
    """Return integers that order like the magnitudes of `x`.

    Without its sign, the bit pattern of a float orders like its magnitude: infinity
    above all numbers and NaN above infinity.
    """
    dtype = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, dtype) & jnp.iinfo(dtype).max


def select(
    form: Any, vector: jax.Array, rounds: int, first: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the entries of largest magnitude of every block; see `forms.Form`.

    Up to `rounds` of small blocks are found by rounds of maxima, each by `first`.
    """
    if form.tile and form.kept <= rounds:
        offsets = by_rounds(vector, form.kept, first)
    elif form.tile:
        rows = vector.swapaxes(1, 2)
        found = largest(rows.reshape(-1, form.size), form.kept)
        offsets = found.reshape(*rows.shape[:2], form.kept).swapaxes(1, 2)
    else:
        offsets = largest(vector, form.kept)
    at = offsets.astype(jnp.uint32)
    values = jnp.take_along_axis(vector, at, axis=1, mode="promise_in_bounds")
    return values, offsets


def largest(vector: jax.Array, kept: int) -> jax.Array:
    """Return the ascending offsets of the `kept` largest entries of every row, int32.

    Among equal magnitudes the first come first, so the set is that of `lax.top_k`.
    """
    sort = lambda x: jnp.sort(lax.top_k(magnitudes(x), kept)[1], axis=1)
    return lax.platform_dependent(
        vector,
        tpu=lambda x: sort(x).astype(jnp.int32),
        default=lambda x: _by_bisection(x, kept),
    )


def first_largest(x: jax.Array) -> jax.Array:
    """Return what `argmax` does, by two reductions, which CPUs vectorise."""
    peak = jnp.max(x, axis=1, keepdims=True)
    places = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    at = jnp.where(x == peak, places, x.shape[1])
    return jnp.min(at, axis=1, keepdims=True)


def argmax(x: jax.Array) -> jax.Array:
    """Return where each largest number along axis 1 is first."""
    return jnp.argmax(x, axis=1, keepdims=True).astype(jnp.int32)


def by_rounds(vector: jax.Array, kept: int, first: Any) -> jax.Array:
    """Return what `largest` does, along axis 1 whatever lies behind it."""
    left, found = magnitudes(vector), []
    places = lax.broadcasted_iota(jnp.int32, vector.shape, 1)
    for _ in range(kept):
        found.append(first(left))
        left = jnp.where(places == found[-1], -1, left)
    # Sorted against each other.
    for last in range(kept - 1, 0, -1):
        for i in range(last):
            low, high = found[i], found[i + 1]
            found[i], found[i + 1] = jnp.minimum(low, high), jnp.maximum(low, high)
    return jnp.concatenate(found, axis=1)


def _by_bisection(vector: jax.Array, kept: int) -> jax.Array:
    count, size = vector.shape
    if kept == size:
        return jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (count, size))
    bits = magnitudes(vector)
    # A power of two near the root of size / kept makes both levels small.
    group = 2 ** max(0, round(math.log2(size / kept) / 2))
    low = jnp.zeros(count, bits.dtype)
    if group < _SMALLEST_GROUP:
        return _positions(bits, kept, kept, low)[0]
    groups = -(-size // group)
    bits = jnp.pad(bits, [(0, 0), (0, groups * group - size)], constant_values=-1)
    bits = bits.reshape(count, groups, group)
    room = min(groups, max(kept + 1, round(_SLACK * kept)))
    # The entries lie in the `kept` groups of largest maximum: each of those groups has
    # an entry that comes before all entries of the others. As many groups as are wanted
    # of the entries reach `low`, so as many entries do.
    chosen, low = _positions(jnp.max(bits, axis=2), kept, room, low)
    take = lambda entries, index: entries.at[index].get(mode="fill", fill_value=-1)
    candidates = jax.vmap(take)(bits, chosen).reshape(count, room * group)
    places, _ = _positions(candidates, kept, kept, low)
    first = jnp.take_along_axis(chosen, places // group, axis=1)
    return first * group + places % group


def _positions(
    bits: jax.Array, least: int, most: int, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return `most` positions, of at least the `least` largest entries of every row.

    Among equal entries the first come first, negative ones never. Positions ascend;
    those behind the last are at least the size of a row. At least `least` entries must
    reach `low`, one number for each row; a number not below it is returned as well.
    """
    missing = -bits.shape[1] % _WORD
    bits = jnp.pad(bits, [(0, 0), (0, missing)], constant_values=-1)
    low = _threshold(bits, least, most, low)
    threshold = low[:, None]
    above, equal = bits > threshold, bits == threshold
    # Of the entries at the threshold as many as there is room for, from the first.
    left = most - _count(above, axis=1)[:, None]
    last = _nth(_words(equal), left - 1)
    index = jnp.arange(bits.shape[1], dtype=jnp.int32)[None]
    slots = jnp.broadcast_to(jnp.arange(most, dtype=jnp.int32), (bits.shape[0], most))
    return _nth(_words(above | (equal & (index <= last))), slots), low


def _threshold(bits: jax.Array, least: int, most: int, low: jax.Array) -> jax.Array:
    """Return for every row a number that at least `least` of its entries reach.

    No more than `most` reach it, or else it is the `least`-th largest entry.
    """
    rows, size = bits.shape
    width = 8 * bits.dtype.itemsize - 1
    limit = jnp.iinfo(bits.dtype).max

    def halve(carry):
        low, high, middle, reached = carry
        # A number less another, shifted down to its sign, is -1 if it is the smaller
        # one: half the time that XLA takes to count booleans. No difference overflows,
        # since `middle` is not negative.
        below = (bits.reshape(rows, -1, _WORD) - middle[:, None, None]) >> width
        count = size + _count(_count(below, axis=2), axis=1)
        enough = count >= least
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)
        middle = high - ((high - low) >> 1)
        return low, high, middle, jnp.where(enough, count, reached)

    def searching(carry):
        low, high, _, reached = carry
        return jnp.any((low < high) & (reached > most))

    # Most often the threshold is not far above `low`.
    step = 2 ** (width - 7)
    middle = jnp.minimum(low, limit - step) + step
    start = low, jnp.full_like(low, limit), middle, jnp.full(rows, size, jnp.int32)
    start = vary_like(bits, start)
    # To end early, an accelerator would have to report to the host.
    return lax.platform_dependent(
        cpu=lambda: lax.while_loop(searching, halve, start)[0],
        default=lambda: lax.fori_loop(0, width + 1, lambda _, x: halve(x), start)[0],
    )


def _count(x: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(x, axis, dtype=jnp.int32)


def _words(mask: jax.Array) -> jax.Array:
    """Return the rows of `mask` in words, the first entry in the lowest bit."""
    lanes = jnp.arange(_WORD, dtype=jnp.uint32)[None, None]
    bits = mask.reshape(len(mask), -1, _WORD).astype(jnp.uint32)
    return jnp.sum(bits << lanes, axis=2, dtype=jnp.uint32)


def _nth(words: jax.Array, rank: jax.Array) -> jax.Array:
    """Return the position of the set bit number `rank`, from 0, of every row.

    At least the number of bits of a row where that many bits are not set.
    """
    count = lambda words: lax.population_count(words).astype(jnp.int32)
    set_bits = count(words)
    ends = jnp.cumsum(set_bits, axis=1, dtype=jnp.int32)
    method = "compare_all" if words.shape[1] <= 64 else "scan"
    search = functools.partial(jnp.searchsorted, side="right", method=method)
    word = jax.vmap(search)(ends, rank).astype(jnp.int32)
    take = lambda array: jnp.take_along_axis(array, word, axis=1, mode="clip")
    rest, rank = take(words), rank - take(ends - set_bits)
    # As many as bits of the word up to which there are not more than `rank` set.
    upto = jnp.uint32(2 ** np.arange(1, _WORD + 1) - 1)[None, None]
    place = _count(count(rest[:, :, None] & upto) <= rank[:, :, None], axis=2)
    return word * _WORD + place

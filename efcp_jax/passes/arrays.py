"""Passes over whole arrays: looked over, or written where they lie."""

from collections.abc import Callable, Iterable, Sequence
import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.collectives import vary_like
from efcp_jax.numerics import power_of_two, saturate


# Entries of equal leaves that a CPU lays side by side.
_STACKED = 1 << 18


def finite(
    kinds: Iterable[Sequence[jax.Array]],
    packed: Callable[[], Iterable[jax.Array]],
) -> jax.Array:
    """Return whether all entries of leaves, of which there are some kinds, are finite.

    `packed` makes them in working form, as accelerators do anyway.
    """

    def looked_at() -> jax.Array:
        of_each = lambda x: [jnp.all(jnp.isfinite(x).reshape(len(x), -1), axis=1)]
        each = [made for leaves in kinds for made in of_stacked(of_each, leaves)]
        return jnp.all(jnp.concatenate([jnp.ones(1, bool), *each]))

    def none_counted() -> jax.Array:
        # Accelerators reduce truth values by way of an array of them; a sum of floats
        # they join with whatever else is read. It cannot fall back to zero.
        faults = [jnp.sum((~jnp.isfinite(x)).astype(jnp.float32)) for x in packed()]
        return sum(faults, jnp.zeros((), jnp.float32)) == 0

    return lax.platform_dependent(cpu=looked_at, default=none_counted)


def all_finite(arrays: Iterable[jax.Array]) -> jax.Array:
    """Return whether all entries of all arrays are finite, a boolean."""
    # Not a reduction with a function of one's own, which XLA cannot divide among
    # devices where its partitioner does the spreading.
    each = [jnp.all(jnp.isfinite(array)) for array in arrays]
    return functools.reduce(jnp.logical_and, each, jnp.asarray(True))


def row_scale(tree: chex.ArrayTree, scaled: bool) -> tuple[jax.Array, jax.Array]:
    """Return what a row of `tree` is divided by, and its inverse, in the leaves' dtype.

    The least power of two above the largest magnitude, 0 for zeros; if not `scaled`, 1.
    """
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(leaves[0]) if leaves else jnp.float32
    if not scaled:
        return jnp.ones((), dtype), jnp.ones((), dtype)
    zero = jnp.zeros((), dtype)
    # Not the larger of both ends: XLA divides the maximum of leaves laid end to end
    # into one for each leaf, which accelerators launch one by one. That of magnitudes
    # is left whole, without a temporary.
    peaks = [jnp.max(jnp.abs(leaf), initial=zero) for leaf in leaves]
    return power_of_two(jnp.max(jnp.stack([zero, *peaks])))


def turned_together(array: jax.Array) -> jax.Array:
    """Return `array`, of many small leaves; else a TPU would turn each by itself."""
    keep = lax.optimization_barrier
    return lax.platform_dependent(array, tpu=keep, default=lambda x: x)


def on_cpus(function: Callable[..., Any], *given: Any) -> Any:
    """Return what `function` makes of what is given on CPUs, elsewhere what is given.

    For parts of many small leaves to wait for each other. Elsewhere XLA orders them: if
    they wait, a GPU keeps a third more, and a TPU has an eighth more kernels.
    """
    return lax.platform_dependent(*given, cpu=function, default=lambda *x: x)


def of_stacked(
    function: Callable[[jax.Array], list[jax.Array]], leaves: Sequence[jax.Array]
) -> list[jax.Array]:
    """Return `function` of equal leaves side by side, one after the other along axis 0.

    A CPU would take a copy of all of them, and takes as many as stay in its cache.
    """

    def whole(*leaves: jax.Array) -> list[jax.Array]:
        return function(jnp.stack(leaves))

    def some_by_some(*leaves: jax.Array) -> list[jax.Array]:
        count = max(1, _STACKED // max(1, leaves[0].size))
        if count >= len(leaves):
            return whole(*leaves)
        # The last are as many as the others: some are taken twice.
        starts = range(0, len(leaves), count)
        starts = [min(start, len(leaves) - count) for start in starts]
        some = [lambda start=start: leaves[start : start + count] for start in starts]

        def step(i: jax.Array, made: list[jax.Array]) -> list[jax.Array]:
            new, at = whole(*lax.switch(i, some)), jnp.asarray(starts)[i]
            put = lambda x, y: lax.dynamic_update_slice_in_dim(x, y, at, axis=0)
            return jax.tree.map(put, made, new)

        shapes = jax.eval_shape(whole, *leaves)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return lax.fori_loop(0, len(starts), step, vary_like(leaves, zeros))

    return lax.platform_dependent(*leaves, cpu=some_by_some, default=whole)


def overwrite(
    accept: jax.Array,
    write: Callable[..., jax.Array],
    select: Callable[..., jax.Array],
    array: jax.Array,
    *values: jax.Array,
) -> jax.Array:
    """Return `array` overwritten if `accept`, in place if it is not needed otherwise.

    On CPUs, XLA fuses a write with each of the readers of its result, which then make
    it anew from a copy of `array` each. A branch is where fusion ends, and no work at
    all where nothing is written. An accelerator would have to ask the host which branch
    to take, so there the choice is between values: `select` makes it, and `write` does
    not ask. Both take `array` and `values`.
    """

    def branch(array: jax.Array, *values: jax.Array) -> jax.Array:
        # Behind the barrier, since a branch that is always taken would be no branch.
        taken = lax.optimization_barrier(accept)
        return lax.cond(taken, write, lambda array, *_: array, array, *values)

    return lax.platform_dependent(array, *values, cpu=branch, default=select)


def insert(
    rows: jax.Array, row: jax.Array, slot: jax.Array, axis: int, accept: jax.Array
) -> jax.Array:
    """Return `rows`, laid end to end along `axis`, with `row` at `slot` if `accept`.

    In place if they are donated.
    """
    size = row.shape[axis]
    write = lambda rows, row, slot: lax.dynamic_update_slice_in_dim(
        rows, row, slot * size, axis
    )

    def select(rows: jax.Array, row: jax.Array, slot: jax.Array) -> jax.Array:
        old = lax.dynamic_slice_in_dim(rows, slot * size, size, axis)
        return write(rows, jnp.where(accept, row, old), slot)

    @jax.custom_jvp
    def write_bits(rows: jax.Array, row: jax.Array, slot: jax.Array) -> jax.Array:
        pattern = f"uint{8 * rows.dtype.itemsize}"
        bits = lambda x: lax.bitcast_convert_type(x, pattern)
        return lax.bitcast_convert_type(write(bits(rows), bits(row), slot), rows.dtype)

    # Bits have no derivative.
    write_bits.defjvp(functools.partial(jax.jvp, write))

    # XLA on CPUs writes half precision and less by way of a float32 window, several
    # times slower than as integers.
    narrow = jnp.issubdtype(rows.dtype, jnp.floating) and rows.dtype.itemsize < 4
    return overwrite(accept, write_bits if narrow else write, select, rows, row, slot)


def add(
    array: jax.Array,
    pieces: Callable[[], Iterable[jax.Array]],
    whole: Callable[[], jax.Array],
    accept: jax.Array,
) -> jax.Array:
    """Return `array` plus another, if `accept`; what overflows is the largest number.

    `pieces` makes the other in parts that lie end to end along the first axis, for
    CPUs, which add one after the other; `whole` in one, for accelerators.
    """

    def in_place(array: jax.Array) -> jax.Array:
        start = 0
        # XLA updates a slice where it lies if it is read at the same place, which it
        # can tell only while the place is not a constant.
        zero = lax.optimization_barrier(jnp.int32(0))
        for piece in pieces():
            at = zero + start
            old = lax.dynamic_slice_in_dim(array, at, len(piece))
            new = saturate(old + piece, array.dtype)
            array = lax.dynamic_update_slice_in_dim(array, new, at, axis=0)
            start += len(piece)
        return array

    def select(array: jax.Array) -> jax.Array:
        # The choice comes first, so that all of it is one fused pass.
        return saturate(array + jnp.where(accept, whole(), 0), array.dtype)

    return overwrite(accept, in_place, select, array)


def subtract_products(
    batch: jax.Array, left: jax.Array, right: jax.Array, factor: jax.Array
) -> jax.Array:
    """Return `batch` minus `factor` $L^T R$ for each pair of thin factors, in one pass.

    The batch is `(g, rows, cols)`, the factors `(g, r, rows)` and `(g, r, cols)`. Such
    a product is no work for a library, which would return an array as large.
    """

    def one_by_one(batch: jax.Array) -> jax.Array:
        pairs = [left[:, k, :, None] * right[:, k, None] for k in range(left.shape[1])]
        return batch - factor * sum(pairs[1:], pairs[0])

    def summed(batch: jax.Array) -> jax.Array:
        products = left[:, :, :, None] * right[:, :, None]
        return batch - factor * jnp.sum(products, axis=1)

    # CPUs take forty times as long for the sum, GPUs a kernel for every product.
    return lax.platform_dependent(batch, cpu=one_by_one, default=summed)

"""The gradient added to the error, where it lies."""

from collections.abc import Callable, Iterable

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.numerics import saturate
from efcp_jax.passes.overwrite import overwrite


def add(
    array: jax.Array,
    pieces: Callable[[], Iterable[jax.Array]],
    whole: Callable[[], jax.Array],
    accept: jax.Array,
) -> jax.Array:
    """Return `array` plus another, if `accept`.

    What overflows becomes the largest number.

    Args:
        array: Shape `(n, ...)`.
        pieces: Makes the other in parts that lie end to end along the first axis, for
            CPUs, which add one after the other.
        whole: Makes the other in one, for accelerators.
        accept: Whether to add, a boolean.

    Returns:
        Array of the shape and dtype of `array`.
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

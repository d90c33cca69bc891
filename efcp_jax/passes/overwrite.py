"""Overwriting an array, or not, where it lies."""

from collections.abc import Callable

import jax
from jax import lax


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
    to take, so there the choice is between values.

    Args:
        accept: Whether to write, a boolean.
        write: From `array` and `values` to the array overwritten.
        select: The same if `accept`; else `array`, as a choice between values.
        array: What is overwritten.
        *values: What is written.

    Returns:
        Array of the shape and dtype of `array`.
    """

    def branch(array: jax.Array, *values: jax.Array) -> jax.Array:
        # Behind the barrier, since a branch that is always taken would be no branch.
        taken = lax.optimization_barrier(accept)
        return lax.cond(taken, write, lambda array, *_: array, array, *values)

    return lax.platform_dependent(array, *values, cpu=branch, default=select)

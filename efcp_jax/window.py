"""The sliding window: the last m rows, whatever their representation.

Row i of the window stands for the past gradient $s_i r_i$, with a stored row $r_i$ of
magnitude about 1 and a power of two $s_i$. Slots that were never filled have scale 0
and zero rows, and need no special case.
"""

from typing import NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.compressors import ROW_AXIS, Space
from efcp_jax.passes.overwrite import overwrite


class Window(NamedTuple):
    """The last m compressed gradients.

    Attributes:
        rows: The stored rows, every array `(s, m, ...)`.
        scale: The power of two that multiplies each row, shape `(m,)`.
        slot: The slot that the next row will overwrite, int32.
        filled: The number of slots that hold a row, int32.
    """

    rows: chex.ArrayTree
    scale: jax.Array
    slot: jax.Array
    filled: jax.Array


def empty(space: Space, size: int, dtype: jax.typing.DTypeLike) -> Window:
    """Return a window of `size` zero rows."""
    _, row, _ = space.zeros()

    def stack(leaf: jax.Array) -> jax.Array:
        shape = (*leaf.shape[:ROW_AXIS], size, *leaf.shape[ROW_AXIS:])
        return jnp.zeros(shape, leaf.dtype)

    return Window(
        rows=jax.tree.map(stack, row),
        scale=jnp.zeros(size, dtype),
        slot=jnp.zeros((), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def read(window: Window, slot: jax.Array) -> chex.ArrayTree:
    """Return the stored row at `slot`."""
    return jax.tree.map(
        lambda rows: lax.dynamic_index_in_dim(rows, slot, ROW_AXIS, keepdims=False),
        window.rows,
    )


def insert(
    window: Window, row: chex.ArrayTree, scale: jax.Array, accept: jax.Array
) -> Window:
    """Overwrite the oldest row, or return the window as it was if not `accept`."""
    slot = window.slot
    size = window.scale.shape[0]
    return Window(
        rows=jax.tree.map(
            lambda old, new: _write(old, new, slot, accept), window.rows, row
        ),
        scale=window.scale.at[slot].set(jnp.where(accept, scale, window.scale[slot])),
        slot=jnp.where(accept, (slot + 1) % size, slot),
        filled=jnp.where(accept, jnp.minimum(window.filled + 1, size), window.filled),
    )


def _write(
    rows: jax.Array, row: jax.Array, slot: jax.Array, accept: jax.Array
) -> jax.Array:
    """Return `rows` with `row` at `slot` if `accept`; in place if they are donated."""
    write = lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, slot, ROW_AXIS)

    def select(rows: jax.Array, row: jax.Array) -> jax.Array:
        old = lax.dynamic_index_in_dim(rows, slot, ROW_AXIS, keepdims=False)
        return write(rows, jnp.where(accept, row, old))

    def write_bits(rows: jax.Array, row: jax.Array) -> jax.Array:
        bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16)
        return lax.bitcast_convert_type(write(bits(rows), bits(row)), rows.dtype)

    # XLA on CPUs writes half precision by way of a float32 window, several times slower
    # than as integers.
    on_cpu = write_bits if _is_half(rows.dtype) else write
    return overwrite(accept, on_cpu, select, rows, row)


def _is_half(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2


def inner(space: Space, window: Window, row: chex.ArrayTree) -> chex.ArrayTree:
    """Return the stored rows' inner products with `row` once it is at the next slot.

    Shape `(m,)` for each Gram matrix, this device's share. The entry of the row about
    to be overwritten is the row's product with itself.
    """
    products = space.inner(window.rows, row)
    alone = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, ROW_AXIS), row)
    return jax.tree.map(
        lambda all_rows, itself: all_rows.at[window.slot].set(itself[0]),
        products,
        space.inner(alone, row),
    )

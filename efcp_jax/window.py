"""The sliding window: the last m rows, whatever their representation.

Row i of the window stands for the past gradient $s_i r_i$, with a stored row $r_i$ of
magnitude about 1 and a power of two $s_i$. Slots that were never filled have scale 0
and zero rows, and need no special case. Rows lie end to end along one axis, so a row is
a window of one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from efcp_jax import passes
from efcp_jax.compressors import ROW_AXIS, Space


class Window(NamedTuple):
    """The last m compressed gradients.

    Attributes:
        rows: The stored rows, every array `(s, m k, ...)` if a row's is `(s, k, ...)`.
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
        shape = list(leaf.shape)
        shape[ROW_AXIS] *= size
        return jnp.zeros(shape, leaf.dtype)

    return Window(
        rows=jax.tree.map(stack, row),
        scale=jnp.zeros(size, dtype),
        slot=jnp.zeros((), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def insert(
    window: Window, row: chex.ArrayTree, scale: jax.Array, accept: jax.Array
) -> Window:
    """Overwrite the oldest row, or return the window as it was if not `accept`."""
    slot = window.slot
    size = window.scale.shape[0]
    return Window(
        rows=jax.tree.map(
            lambda old, new: passes.insert(old, new, slot, ROW_AXIS, accept),
            window.rows,
            row,
        ),
        scale=window.scale.at[slot].set(jnp.where(accept, scale, window.scale[slot])),
        slot=jnp.where(accept, (slot + 1) % size, slot),
        filled=jnp.where(accept, jnp.minimum(window.filled + 1, size), window.filled),
    )


def products(product: Callable[[Any], Any], window: Window, row: chex.ArrayTree) -> Any:
    """Return the stored rows' inner products with a vector once `row` is inserted.

    Args:
        product: From rows to their inner products, shape `(m,)`, or `(g, m)` for an
            array of Gram matrices.
        window: The window in front of the insertion.
        row: The row that will be at the next slot.
    """
    return jax.tree.map(
        lambda all_rows, new: all_rows.at[..., window.slot].set(new[..., 0]),
        product(window.rows),
        product(row),
    )

"""The Gram matrix of the window, under replacement of one row, and the age of rows."""

import jax
import jax.numpy as jnp

from efcp_jax.passes.overwrite import overwrite


def replace(
    gram: jax.Array, products: jax.Array, slot: jax.Array, accept: jax.Array
) -> jax.Array:
    """Return `gram` with row and column `slot` set to `products`, if `accept`.

    Every entry is a fresh inner product of two stored rows, so nothing drifts however
    often rows are replaced.

    Args:
        gram: Inner products of the stored rows, shape `(m, m)`.
        products: Inner products of all rows with the new one, shape `(m,)`.
        slot: Slot of the new row, int32.
        accept: Whether to replace at all, a boolean.

    Returns:
        Array of the shape and dtype of `gram`.
    """

    def write(gram: jax.Array, products: jax.Array) -> jax.Array:
        return gram.at[slot].set(products).at[:, slot].set(products)

    def select(gram: jax.Array, products: jax.Array) -> jax.Array:
        return write(gram, jnp.where(accept, products, gram[slot]))

    return overwrite(accept, write, select, gram, products)


def ages(size: int, slot: jax.Array) -> jax.Array:
    """Return the age of every slot when the newest row is at `slot`; 0 is the newest.

    Args:
        size: Number of slots m.
        slot: Slot of the newest row, int32.

    Returns:
        Whole numbers in [0, m), int32, shape `(m,)`.
    """
    return (slot - jnp.arange(size, dtype=jnp.int32)) % size

"""The Gram matrix of the window, under replacement of one row, and moments over it."""

import jax
import jax.numpy as jnp

from efcp_jax.numerics import root
from efcp_jax.passes import overwrite


def replace(
    gram: jax.Array, products: jax.Array, slot: jax.Array, accept: jax.Array
) -> jax.Array:
    """Return `gram` with row and column `slot` set to `products`, if `accept`.

    Every entry is a fresh inner product of two stored rows, so nothing drifts however
    often rows are replaced.

    Args:
        gram: Inner products of the stored rows, shape `(..., m, m)`.
        products: Inner products of all rows with the new one, shape `(..., m)`.
        slot: Slot of the new row, int32.
        accept: Whether to replace at all, a boolean.

    Returns:
        Array of the shape and dtype of `gram`.
    """

    def write(gram: jax.Array, products: jax.Array) -> jax.Array:
        return gram.at[..., slot, :].set(products).at[..., slot].set(products)

    def select(gram: jax.Array, products: jax.Array) -> jax.Array:
        return write(gram, jnp.where(accept, products, gram[..., slot, :]))

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


def mean_square(gram: jax.Array, scale: jax.Array, filled: jax.Array) -> jax.Array:
    """Return the mean squared norm of the rows there are, 0 for none.

    Args:
        gram: Inner products of the stored rows, shape `(m, m)`.
        scale: What multiplies each row, shape `(m,)`.
        filled: Number of slots that hold a row.

    Returns:
        A scalar in the dtype of `gram`, at most its largest number.
    """
    share = scale / jnp.sqrt(jnp.maximum(filled, 1).astype(gram.dtype))
    total = jnp.sum((share * root(jnp.diagonal(gram))) ** 2)
    return jnp.minimum(total, jnp.finfo(gram.dtype).max)


def in_own_unit(
    gram: jax.Array, scale: jax.Array, filled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the scales over the largest of them, and the mean square in that unit.

    Scales are powers of two, so that nothing is rounded, and no square of the largest
    leaves the range.

    Args:
        gram: Inner products of the stored rows, shape `(m, m)`.
        scale: What multiplies each row, shape `(m,)`.
        filled: Number of slots that hold a row.

    Returns:
        Numbers of at most 1, shape `(m,)`, and the mean squared norm of the rows that
        they make.
    """
    largest = jnp.max(scale)
    scale = scale / jnp.where(largest > 0, largest, 1)
    return scale, mean_square(gram, scale, filled)


def moment(
    age: jax.Array,
    filled: jax.Array,
    b1: jax.Array,
    b2: jax.Array | float = 1.0,
    *,
    nesterov: bool = False,
) -> jax.Array:
    r"""Return what of each row is preconditioned, $b_i / b_2^{age_i}$.

    $b_i = (1 - b_1)\, b_1^{age_i}$, the first moment of the stored gradients; with
    `nesterov`, $b_1 b_i + (1 - b_1) \delta_{ij}$, the moment that the newest gradient
    would be part of twice.

    Args:
        age: Age of every slot, 0 for the newest, shape `(m,)`.
        filled: Number of slots that hold a row.
        b1: Decay of the first moment, in [0, 1), at most `b2`.
        b2: Decay of the rows, in (0, 1]. As one power nothing under- or overflows.
        nesterov: Whether to look ahead.

    Returns:
        Numbers in [0, 1], 0 for empty slots, shape `(m,)`, in the dtype of `b1`.
    """
    faded = (1 - b1) * (b1 / b2) ** age.astype(b1.dtype)
    if nesterov:
        faded = b1 * faded + jnp.where(age == 0, 1 - b1, 0)
    return jnp.where(age < filled, faded, 0)

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
    often rows are replaced. Shapes are `(..., m, m)` and `(..., m)`.
    """

    def write(gram: jax.Array, products: jax.Array) -> jax.Array:
        return gram.at[..., slot, :].set(products).at[..., slot].set(products)

    def select(gram: jax.Array, products: jax.Array) -> jax.Array:
        return write(gram, jnp.where(accept, products, gram[..., slot, :]))

    return overwrite(accept, write, select, gram, products)


def ages(size: int, slot: jax.Array) -> jax.Array:
    """Return the age of every slot when the newest row, of age 0, is at `slot`."""
    return (slot - jnp.arange(size, dtype=jnp.int32)) % size


def in_own_unit(
    gram: jax.Array, scale: jax.Array, filled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the scales over the largest, and the mean squared norm of the rows then.

    Scales are powers of two, so that nothing is rounded, and no square of the largest
    leaves the range. The mean is over the rows there are, 0 for none.
    """
    largest = jnp.max(scale)
    scale = scale / jnp.where(largest > 0, largest, 1)
    share = scale / jnp.sqrt(jnp.maximum(filled, 1).astype(gram.dtype))
    total = jnp.sum((share * root(jnp.diagonal(gram))) ** 2)
    return scale, jnp.minimum(total, jnp.finfo(gram.dtype).max)


def moment(
    age: jax.Array,
    filled: jax.Array,
    b1: jax.Array,
    b2: jax.Array | float = 1.0,
    *,
    nesterov: bool = False,
) -> jax.Array:
    r"""Return what of each row is preconditioned, $b_i / b_2^{age_i}$, in [0, 1].

    $b_i = (1 - b_1)\, b_1^{age_i}$, the first moment of the stored gradients; with
    `nesterov`, $b_1 b_i + (1 - b_1) \delta_{ij}$, the moment that the newest gradient
    would be part of twice. As one power nothing under- or overflows.
    """
    faded = (1 - b1) * (b1 / b2) ** age.astype(b1.dtype)
    if nesterov:
        faded = b1 * faded + jnp.where(age == 0, 1 - b1, 0)
    return jnp.where(age < filled, faded, 0)

"""Products of batches of thin factors, subtracted where a batch lies."""

import jax
from jax import lax
import jax.numpy as jnp


def subtract_products(batch: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Return `batch` minus $L^T R$ for each pair of thin factors, in one pass.

    A product of few rows is no work for a library, which would return it in an array as
    large as the batch.

    Args:
        batch: Shape `(g, rows, cols)`.
        left: Shape `(g, r, rows)`.
        right: Shape `(g, r, cols)`.

    Returns:
        Array of the shape and dtype of `batch`.
    """

    def one_by_one(batch: jax.Array) -> jax.Array:
        for k in range(left.shape[1]):
            batch = batch - left[:, k, :, None] * right[:, k, None]
        return batch

    def summed(batch: jax.Array) -> jax.Array:
        return batch - jnp.sum(left[:, :, :, None] * right[:, :, None], axis=1)

    # CPUs take forty times as long for the sum, GPUs a kernel for every product.
    return lax.platform_dependent(batch, cpu=one_by_one, default=summed)

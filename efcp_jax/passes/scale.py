"""The scale of a row, from the largest magnitude in it."""

import chex
import jax
import jax.numpy as jnp

from efcp_jax.numerics import power_of_two


def row_scale(tree: chex.ArrayTree, scaled: bool) -> tuple[jax.Array, jax.Array]:
    """Return the power of two that a row is divided by, and its inverse.

    Args:
        tree: Everything that a row will hold.
        scaled: Whether to divide at all.

    Returns:
        The least power of two above the largest magnitude, or 0 for zeros, and its
        inverse; ones if not `scaled`. In the dtype of the leaves.
    """
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(leaves[0]) if leaves else jnp.float32
    if not scaled:
        return jnp.ones((), dtype), jnp.ones((), dtype)
    peaks = [_peak(leaf) for leaf in leaves]
    return power_of_two(jnp.max(jnp.stack([jnp.zeros((), dtype), *peaks])))


def _peak(array: jax.Array) -> jax.Array:
    """Return the largest magnitude, NaN if there is one, without a temporary."""
    # Not the larger of both ends: XLA divides the maximum of leaves laid end to end
    # into one for each leaf, which accelerators launch one by one. That of magnitudes
    # is left whole.
    return jnp.max(jnp.abs(array), initial=jnp.zeros((), array.dtype))

"""The scale of a row, from the largest magnitude in it."""

from typing import Any

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
    return _power_of_two(jnp.max(jnp.stack([jnp.zeros((), dtype), *peaks])))


@jax.custom_jvp
def _power_of_two(peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `power_of_two(peak)`, which are constants.

    Where a derivative is taken, zeros are 1 times zeros: 0 times a row would hide that
    the row depends on something.
    """
    return power_of_two(peak)


@_power_of_two.defjvp
def _power_of_two_jvp(primals: Any, tangents: Any) -> Any:
    del tangents
    made = tuple(jnp.where(x == 0, 1, x) for x in power_of_two(*primals))
    return made, tuple(map(jnp.zeros_like, made))


def _peak(array: jax.Array) -> jax.Array:
    """Return the largest magnitude, NaN if there is one, without a temporary."""
    # Not the larger of both ends: XLA divides the maximum of leaves laid end to end
    # into one for each leaf, which accelerators launch one by one. That of magnitudes
    # is left whole.
    return jnp.max(jnp.abs(array), initial=jnp.zeros((), array.dtype))

"""Whether a gradient is finite, looked at as it is needed afterwards."""

from collections.abc import Callable, Iterable
import functools

import jax
from jax import lax
import jax.numpy as jnp


def finite(
    pieces: Callable[[], Iterable[jax.Array]],
    packed: Callable[[], Iterable[jax.Array]],
) -> jax.Array:
    """Return whether all entries are finite.

    Args:
        pieces: Makes the entries a few leaves at a time: so CPUs look at them, and add
            them to the error.
        packed: Makes the entries in working form, which accelerators make anyway, to
            look at them in one piece.

    Returns:
        A boolean.
    """
    return lax.platform_dependent(
        cpu=lambda: all_finite(pieces()),
        default=lambda: _none_counted(packed()),
    )


def all_finite(arrays: Iterable[jax.Array]) -> jax.Array:
    """Return whether all entries of all arrays are finite, a boolean."""
    # Not a reduction with a function of one's own, which XLA cannot divide among
    # devices where its partitioner does the spreading.
    each = [jnp.all(jnp.isfinite(array)) for array in arrays]
    return functools.reduce(jnp.logical_and, each, jnp.asarray(True))


def _none_counted(arrays: Iterable[jax.Array]) -> jax.Array:
    # Accelerators reduce truth values by way of an array of them; a sum of floats they
    # join with whatever else is read of the entries. It cannot fall back to zero.
    each = [jnp.sum((~jnp.isfinite(array)).astype(jnp.float32)) for array in arrays]
    return sum(each, jnp.zeros((), jnp.float32)) == 0

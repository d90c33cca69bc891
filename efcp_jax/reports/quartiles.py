"""Quartiles of update over gradient, by counting alone: nothing is sorted or moved.

A sort would gather all parameters of a mesh on every device. A threshold that a quarter
of the ratios reach is found bit by bit instead, from sums over every leaf where it
lies. The upper 16 bits of a float32 decide, its sign, its exponent and 7 bits behind
the leading one: what is read 15 times are 2 bytes a parameter.
"""

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.numerics import indexed, widest


_SHARES = (0.25, 0.5, 0.75)

# Numbers without a sign that 16 bits hold, as a power of two.
_BITS = 15


def ratio_quartiles(updates: chex.ArrayTree, gradients: chex.ArrayTree) -> jax.Array:
    r"""Return the quartiles of $|u_i / g_i|$ over the coordinates with $g_i \ne 0$.

    The least number that at least a quarter, a half and three quarters of the ratios
    do not exceed.

    Args:
        updates: $u$, a tree of arrays.
        gradients: $g$, likewise. Coordinates where it is 0 or NaN are left out.

    Returns:
        Three float32 numbers, ascending, each off by at most 0.4%; zeros if no
        coordinate is left. Ratios outside of the range of float32 are 0 or infinite.

    Notes:
        Time: 15 passes over 2 bytes a parameter, which are its only memory.
    """
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True)
    # In parts whose entries an int32 counts.
    keys = [part for pair in pairs for part in _parts(_key(*pair))]
    count = lambda limit: sum(
        (jnp.sum(key <= limit, dtype=jnp.int32).astype(jnp.float32) for key in keys),
        jnp.zeros(()),
    )
    outside = count(jnp.int16(-1))
    inside = count(jnp.int16(2**_BITS - 1)) - outside
    wanted = [outside + share * inside for share in _SHARES]

    def halve(_: jax.Array, between: tuple[jax.Array, jax.Array]):
        low, high = between
        middle = (low + high) >> 1
        reached = jnp.stack(
            [
                count(each.astype(jnp.int16)) >= share
                for each, share in zip(jnp.unstack(middle), wanted, strict=True)
            ]
        )
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    # Made from a count, so that they live where the results of the loop will.
    start = jnp.stack([jnp.zeros_like(inside, jnp.int32)] * len(_SHARES))
    low, _ = lax.fori_loop(0, _BITS, halve, (start, start + (2**_BITS - 1)))
    # The middle of what has these upper bits. Nothing is left out of the loop's last
    # halving: after 15 of them 2^15 numbers have become one.
    middle = lax.bitcast_convert_type(low << 16 | 2**15, jnp.float32)
    infinite = low >= 0x7F80
    return jnp.where(infinite, jnp.inf, jnp.where(low == 0, 0, middle))


def _parts(key: jax.Array) -> list[jax.Array]:
    """Return the entries as one array, or in as many as an index needs."""
    if key.size <= indexed():
        return [key]
    flat = key.reshape(-1)
    return [flat[i : i + indexed()] for i in range(0, key.size, indexed())]


def _key(update: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return the upper bits of the ratios as int16, which order alike; -1 for none."""
    gradient = jnp.abs(gradient.astype(widest(gradient.dtype)))
    update = jnp.abs(update.astype(widest(update.dtype)))
    known = gradient > 0  # False for NaN
    ratio = update.astype(gradient.dtype) / jnp.where(known, gradient, 1)
    bits = lax.bitcast_convert_type(ratio.astype(jnp.float32), jnp.int32)
    # Division makes no sign here, but NaN may have one.
    upper = (bits >> 16) & (2**_BITS - 1)
    return jnp.where(known, upper, -1).astype(jnp.int16)

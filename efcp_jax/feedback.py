r"""Error feedback: what compression drops now is added to the next gradient.

$a_t = e_t + g_t$, $c_t = C(a_t)$, $e_{t+1} = a_t - c_t$, $e_0 = 0$. Nothing is lost,
only delayed; the rounding of stored values is part of the error.
"""

from typing import NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.compressors import Space
from efcp_jax.numerics import cast, power_of_two


class Compressed(NamedTuple):
    """The compressed gradient of one step.

    Attributes:
        row: The row $c_t / s$, entries of magnitude at most about 1.
        scale: The power of two $s$, a scalar; 0 for a zero gradient.
        error: $e_{t+1}$, or None without error feedback.
        basis: The basis of the next step, or None.
        finite: Whether all entries of $g_t$ on this device are finite.
    """

    row: chex.ArrayTree
    scale: jax.Array
    error: chex.ArrayTree | None
    basis: chex.ArrayTree | None
    finite: jax.Array


def compress(
    space: Space,
    tree: chex.ArrayTree,
    error: chex.ArrayTree | None,
    basis: chex.ArrayTree | None,
    *,
    scaled: bool,
    guarded: bool = False,
) -> Compressed:
    """Compress the gradient plus `error` and return the row and the error that remains.

    Args:
        space: The representation.
        tree: $g_t$, a tree of the layout of `space`.
        error: $e_t$, of the same shapes in any floating dtype; None for no feedback.
        basis: What the representation carries between steps.
        scaled: Whether to divide the row by the power of two above its largest entry,
            which is exact and lets gradients of any magnitude share a window. It needs
            that magnitude on all devices, so it is left out where they would have to
            ask each other. There, norms above 1e19 overflow the Gram matrix, which
            skips the step, and norms below 1e-19 vanish in it.
        guarded: Whether a gradient with an entry that is not finite leaves the error
            as it is. Knowing that before the error is touched, it is overwritten where
            it lies; choosing between the new and the old one needs both.

    Returns:
        The compressed gradient and everything the next step needs.
    """
    finite = space.layout.finite(tree)
    accept = finite if guarded else jnp.asarray(True)
    total = _total(space, tree, error, accept)
    if scaled:
        peaks = [_peak(leaf) for leaf in jax.tree.leaves(total)]
        scale, inverse = power_of_two(jnp.max(jnp.stack(peaks or [jnp.zeros(())])))
    else:
        scale = inverse = jnp.ones((), space.layout.dtype)
    row, basis = space.compress(total, basis, inverse)
    if error is not None:
        rest = space.residual(total, row, jnp.where(accept, scale, 0))
        # An infinity in the error would make every later step non-finite.
        error = jax.tree.map(lambda a, e: cast(a, e.dtype), rest, error)
    return Compressed(row, scale, error, basis, finite)


def _total(
    space: Space,
    tree: chex.ArrayTree,
    error: chex.ArrayTree | None,
    accept: jax.Array,
) -> chex.ArrayTree:
    """Return the error plus the gradient, or the error alone if not `accept`.

    A sum that overflows becomes the largest number.
    """
    if error is None:
        return jax.tree.map(lambda g: jnp.where(accept, g, 0), space.pack(tree))
    error = jax.tree.map(lambda e: e.astype(space.layout.dtype), error)
    return space.accumulate(tree, error, accept)


def _peak(x: jax.Array) -> jax.Array:
    """Return the largest magnitude in `x`, in one reduction without a temporary."""
    larger = lambda peak, x: jnp.maximum(jnp.abs(peak), jnp.abs(x))
    peak = lax.reduce(x, jnp.zeros((), x.dtype), larger, tuple(range(x.ndim)))
    return jnp.abs(peak)  # XLA may return a single entry as it is

r"""Error feedback: what compression drops now is added to the next gradient.

$a_t = e_t + g_t$, $c_t = C(a_t)$, $e_{t+1} = a_t - c_t$, $e_0 = 0$. Nothing is lost,
only delayed; the rounding of stored values is part of the error.
"""

import functools
from typing import NamedTuple

import chex
import jax

from efcp_jax import passes
from efcp_jax.compressors import Space


class Compressed(NamedTuple):
    """The compressed gradient of one step.

    Attributes:
        row: The row $c_t / s$, entries of magnitude at most about 1.
        scale: The power of two $s$, a scalar; 0 for a zero gradient.
        error: $e_{t+1}$, or None without error feedback.
        basis: The basis of the next step, or None.
    """

    row: chex.ArrayTree
    scale: jax.Array
    error: chex.ArrayTree | None
    basis: chex.ArrayTree | None


def finite(space: Space, tree: chex.ArrayTree) -> jax.Array:
    """Return whether all entries of $g_t$ on this device are finite."""
    return passes.finite(
        functools.partial(space.layout.pieces, tree),
        lambda: jax.tree.leaves(space.pack(tree)),
    )


def compress(
    space: Space,
    tree: chex.ArrayTree,
    error: chex.ArrayTree | None,
    basis: chex.ArrayTree | None,
    *,
    scaled: bool,
    accept: jax.Array,
    count: jax.Array,
) -> Compressed:
    """Compress the gradient plus `error` and return the row and the error that remains.

    Args:
        space: The representation.
        tree: $g_t$, a tree of the layout of `space`.
        error: $e_t$, as it is kept; None for no feedback.
        basis: What the representation carries between steps.
        scaled: Whether to divide the row by the power of two above its largest entry,
            which is exact and lets gradients of any magnitude share a window. It needs
            that magnitude on all devices, so it is left out where they would have to
            ask each other. There, norms above 1e19 overflow the Gram matrix, which
            skips the step, and norms below 1e-19 vanish in it.
        accept: Whether to add the gradient; else the error stays as it is. Knowing that
            before the error is touched, it is overwritten where it lies; choosing
            between the new and the old one needs both.
        count: The number of the step, for rounding.

    Returns:
        The compressed gradient and everything the next step needs.
    """
    if error is None:
        # Of a gradient that is not accepted nothing is kept, whatever it is.
        total = space.pack(tree)
        row, scale, basis = space.compress(total, basis, scaled)
    else:
        given = tree, error, basis, accept, count, scaled
        row, scale, error, basis = space.feed(*given)
    return Compressed(row, scale, error, basis)

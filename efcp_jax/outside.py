r"""What of a gradient its compressed row leaves out, where all of it is preconditioned.

$x = c_t + r$ with the newest row $c_t$, and the inverse of $\lambda I + G^T G / n$ is
taken of each. That of $c_t$ is a sum of rows, without a cancellation; that of $r$ is
$(r - G^T w) / \lambda$, where little cancels, since $r$ lies across the newest row.
"""

from typing import Any

import jax
import jax.numpy as jnp

from efcp_jax.compressors import Space
from efcp_jax.numerics import roots, saturate


# Entries are at most this many times the scale of the row, so that their inner products
# with rows are finite. Where the error cancels a gradient to less than that share of
# it, what is above is left out.
_LARGEST = 2.0**60


def rest(space: Space, gradient: Any, row: Any, scale: jax.Array) -> Any:
    """Return the gradient minus its row, over the scale of the row, a vector.

    Args:
        space: The representation.
        gradient: The gradient that was compressed, a tree.
        row: What it was compressed to, with the error.
        scale: The power of two that multiplies the row.
    """
    left = space.residual(space.pack(gradient), row, scale)
    first, second = roots(jnp.where(scale > 0, scale, 1), scale.dtype)
    limit = lambda x: jnp.clip(x / first / second, -_LARGEST, _LARGEST)
    return jax.tree.map(limit, left)


def update(space: Space, rows: Any, rest: Any, made: tuple[Any, Any]) -> Any:
    """Return the tree of the sum of rows and of the rest.

    Args:
        space: The representation.
        rows: The rows of the window.
        rest: What `rest` returns.
        made: The coefficients of the rows, and the factor of the rest.
    """
    weights, factor = made
    combined = space.combine(rows, weights)
    add = lambda a, b: saturate(a + b, a.dtype)
    return space.unpack(jax.tree.map(add, combined, space.times(rest, factor)))

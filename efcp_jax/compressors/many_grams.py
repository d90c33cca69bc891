"""A Gram matrix for each leaf, in an array for each group of leaves."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def repeated(counts: dict[str, int], value: Any) -> dict[str, Any]:
    """Return the arrays of `value` once for each leaf, stacked, group by group.

    Args:
        counts: The number of leaves of each group.
        value: A tree of arrays, or of a `PartitionSpec` for each, which stays as it is.

    Returns:
        A tree like `value` for each group.
    """

    def stack(count: int, x: Any) -> Any:
        if isinstance(x, PartitionSpec):
            return x
        return jnp.broadcast_to(x, (count, *x.shape))

    return {
        name: jax.tree.map(lambda x, count=count: stack(count, x), value)
        for name, count in counts.items()
    }


def batched(function: Callable[..., Any], in_turn: bool) -> Callable[..., Any]:
    """Return `function` of one Gram matrix for arrays of them, at once or `in_turn`."""
    if in_turn:
        return lambda *arrays: lax.map(lambda each: function(*each), arrays)
    return jax.vmap(function)

"""A Gram matrix for each leaf, in an array for each group of leaves."""

from collections.abc import Callable
import itertools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np


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


def of_all(function: Callable[..., Any], in_turn: bool) -> Callable[..., Any]:
    """Return `function` of one Gram matrix for all there are.

    Args:
        function: From a Gram matrix, and what else there is one of for each.
        in_turn: Whether one matrix follows the other, without a copy of all; else those
            of all groups are one batch.

    Returns:
        A function of the arrays of Gram matrices, a tree, and of trees that have what
        else there is in place of each array. What it returns is in their places too.
    """

    def call(grams: Any, *others: Any) -> Any:
        leaves, treedef = jax.tree.flatten(grams)
        groups = [*zip(leaves, *map(treedef.flatten_up_to, others), strict=True)]
        if in_turn:
            each = lambda arrays: function(*arrays)
            return treedef.unflatten([lax.map(each, group) for group in groups])
        if not groups:
            return grams
        together = jax.tree.map(lambda *x: jnp.concatenate(x), *groups)
        made = jax.vmap(function)(*together)
        ends = np.cumsum([len(leaf) for leaf in leaves])
        parts = [
            jax.tree.map(lambda x, a=a, b=b: x[a:b], made)
            for a, b in itertools.pairwise([0, *ends])
        ]
        return treedef.unflatten(parts)

    return call

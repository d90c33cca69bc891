"""One Gram matrix over all leaves, or arrays of one for each leaf."""

from collections.abc import Callable
import itertools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np


def of_grams(counts: Any, value: Any) -> Any:
    """Return the arrays of `value` once for each Gram matrix, stacked.

    Args:
        counts: Those of a space.
        value: A tree of arrays, or of a `PartitionSpec` for each, which stays as it is.

    Returns:
        A tree like `value` in place of each of `counts`.
    """
    if counts is None:
        return value

    def stack(count: int, x: Any) -> Any:
        if isinstance(x, PartitionSpec):
            return x
        return jnp.broadcast_to(x, (count, *x.shape))

    each = lambda count: jax.tree.map(lambda x: stack(count, x), value)
    return jax.tree.map(each, counts)


def each_gram(
    function: Callable[..., Any], *, in_turn: bool = False
) -> Callable[..., Any]:
    """Return `function` of one Gram matrix for all there are.

    Args:
        function: From a Gram matrix, and what else there is one of for each.
        in_turn: Whether one matrix follows the other, without a copy of all; else those
            of all arrays are one batch.

    Returns:
        A function of the arrays of Gram matrices, and of trees that have what else
        there is in place of each array. What it returns is in their places too.
    """

    def call(grams: Any, *others: Any) -> Any:
        if not isinstance(grams, dict):
            return function(grams, *others)
        leaves, treedef = jax.tree.flatten(grams)
        groups = [*zip(leaves, *map(treedef.flatten_up_to, others), strict=True)]
        if in_turn:
            each = lambda arrays: function(*arrays)
            return treedef.unflatten([lax.map(each, group) for group in groups])
        together = jax.tree.map(lambda *x: jnp.concatenate(x), *groups)
        made = jax.vmap(function)(*together)
        ends = np.cumsum([len(leaf) for leaf in leaves])
        parts = [
            jax.tree.map(lambda x, a=a, b=b: x[a:b], made)
            for a, b in itertools.pairwise([0, *ends])
        ]
        return treedef.unflatten(parts)

    return call

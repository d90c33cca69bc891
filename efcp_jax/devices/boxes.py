"""Boxes that libraries of layers put around arrays."""

from typing import Any

import jax


def strip_boxes(tree: Any) -> Any:
    """Return `tree` with boxes that carry metadata replaced by the arrays in them.

    State made by mapping over Flax's `nnx.Variable` or `nn.Partitioned` would inherit
    the axis names of the parameter, on arrays that have other axes.
    """

    def strip(node: Any) -> Any:
        if is_variable(node):
            return node.get_value()
        if _is_linen_box(node):
            # Not `unbox`, which under a mesh is a sharding constraint as well.
            (value,) = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
            return value
        return node

    is_box = lambda node: is_variable(node) or _is_linen_box(node)
    return jax.tree.map(strip, tree, is_leaf=is_box)


def is_variable(node: Any) -> bool:
    """Return whether `node` is a variable of Flax's nnx, or one like it."""
    return hasattr(node, "get_metadata") and hasattr(node, "get_value")


def _is_linen_box(node: Any) -> bool:
    return hasattr(node, "unbox") and hasattr(node, "replace_boxed")

"""Trees of parameters: names of leaves, what is said of branches, boxes of arrays."""

from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax


# What is given for branches of a tree, each by the names on the way to it.
Prefix: TypeAlias = tuple[tuple[tuple[str, ...], Any], ...]


def broadcast(
    given: Prefix, tree: chex.ArrayTree, fail: Callable[[str, Any], Exception]
) -> list[Any]:
    """Return what the prefix `given` says of each leaf of `tree`, by its path.

    So a masked or partitioned tree can keep the prefix of the whole. `fail` returns an
    exception for a leaf of which nothing is said, from its name and itself.
    """
    known, found = dict(given), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = names_of(path)
        above = (names[:n] for n in range(len(names), -1, -1))
        key = next((each for each in above if each in known), None)
        if key is None:
            raise fail(leaf_name(path), leaf)
        found.append(known[key])
    return found


def leaf_name(path: Any) -> str:
    """Return how messages name the parameter at `path`."""
    return f"params{jax.tree_util.keystr(path)}"


def names_of(path: Any) -> tuple[str, ...]:
    """Return the keys of a path as words, which all kinds of trees have in common."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def strip_boxes(tree: Any) -> Any:
    """Return `tree` with boxes that libraries of layers put around arrays taken off.

    State made by mapping over Flax's `nnx.Variable` or `nn.Partitioned` would inherit
    the axis names of the parameter, on arrays that have other axes.
    """
    has = lambda node, *names: all(hasattr(node, name) for name in names)
    is_variable = lambda node: has(node, "get_metadata", "get_value")
    is_box = lambda node: has(node, "unbox", "replace_boxed")

    def strip(node: Any) -> Any:
        if is_variable(node):
            return node.get_value()
        if is_box(node):
            # Not `unbox`, which under a mesh is a sharding constraint as well.
            (node,) = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
        return node

    is_leaf = lambda node: is_variable(node) or is_box(node)
    return jax.tree.map(strip, tree, is_leaf=is_leaf)

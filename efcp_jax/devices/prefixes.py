"""Trees that say something of every leaf of another tree, or of whole branches."""

from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax


# What is given for branches of a tree, each by the names on the way to it.
Prefix: TypeAlias = tuple[tuple[tuple[str, ...], Any], ...]


def broadcast(
    given: Prefix, tree: chex.ArrayTree, fail: Callable[[str, Any], Exception]
) -> list[Any]:
    """Return what is given for each leaf of `tree`, by its path.

    Going by paths lets a masked or partitioned tree keep the prefix of the whole.

    Args:
        given: A prefix of a tree that contains `tree`.
        tree: Any tree.
        fail: From the name of a leaf for which nothing is given, and the leaf, to an
            exception.

    Returns:
        One value for each leaf, in order.
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

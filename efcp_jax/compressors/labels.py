"""Labels of the leaves of a tree: which of several compressors takes which leaf."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from efcp_jax.devices.layout import Layout
from efcp_jax.devices.trees import Prefix, broadcast, names_of


def prefix(labels: Any, known: Iterable[str]) -> Prefix:
    """Return a tree of strings as pairs of path and label, which can be hashed.

    Raises:
        TypeError: A label is not a string.
        ValueError: A label is not among those `known`.
    """
    pairs = []
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
        where = f"labels{jax.tree_util.keystr(path)}"
        if not isinstance(label, str):
            raise TypeError(
                "`labels` must be a tree of strings or a function of the parameters to"
                f" one, got {label!r} of type {type(label).__name__} at {where}."
            )
        if label not in known:
            names = ", ".join(map(repr, known))
            raise ValueError(
                f"`labels` must name one of the compressors {names}, got {label!r} at"
                f" {where}. Add {label!r} to `compressors`, or name one of them."
            )
        pairs.append((names_of(path), label))
    return tuple(pairs)


def members(
    labels: Prefix | Callable[[Any], Any], known: tuple[str, ...], layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Return the leaves of each label, by their numbers, in the order of `known`.

    Going by paths lets a masked tree keep the labels of the whole.

    Args:
        labels: What `prefix` returns, or a function from the tree, with
            `jax.ShapeDtypeStruct`s for leaves, to a tree of labels.
        known: The labels there are.
        layout: The leaves. For a tree without any, nothing is checked.

    Returns:
        A tuple of numbers for each of `known`.

    Raises:
        TypeError: A label is not a string.
        ValueError: A leaf has no label, or one that is not known, or a label no leaf.
    """
    if not layout.leaves:
        return dict.fromkeys(known, ())
    leaves = [jax.ShapeDtypeStruct(leaf.whole, leaf.dtype) for leaf in layout.leaves]
    tree = layout.treedef.unflatten(leaves)
    given = broadcast(
        prefix(labels(tree), known) if callable(labels) else labels,
        tree,
        lambda name, leaf: ValueError(
            f"`labels` has no entry for {name} of shape {leaf.shape}. Give it, or a"
            " tree above it, the name of a compressor."
        ),
    )
    found: dict[str, list[int]] = {label: [] for label in known}
    for index, label in enumerate(given):
        found[label].append(index)
    for label, indices in found.items():
        if not indices:
            raise ValueError(
                f"`labels` gives no parameter to the compressor {label!r}. Leave it out"
                " of `compressors`, or label a parameter with it."
            )
    return {label: tuple(indices) for label, indices in found.items()}

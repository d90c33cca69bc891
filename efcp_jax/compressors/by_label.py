"""Another representation for every kind of leaf, one Gram matrix over all of them."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any

import jax

from efcp_jax.compressors.base import Compressor, scoped
from efcp_jax.compressors.composite import PartSpace
from efcp_jax.compressors.parts import Part
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.trees import Prefix, broadcast, names_of


@dataclasses.dataclass(frozen=True)
class ByLabel:
    """Configuration of a representation by label; made by `by_label`."""

    compressors: tuple[tuple[str, Compressor], ...]
    labels: Prefix | Callable[[Any], Any]
    block_diagonal: bool = False

    @property
    def lossless(self) -> bool:
        """Whether all compressors are."""
        return all(compressor.lossless for _, compressor in self.compressors)

    def bind(self, layout: Layout) -> PartSpace:
        """Return the space of all compressors for trees of `layout`."""
        found = _members(self.labels, [label for label, _ in self.compressors], layout)
        parts = [
            Part.of(label, scoped(each, self.block_diagonal).bind, layout, found[label])
            for label, each in self.compressors
        ]
        return PartSpace(layout, tuple(parts), self.block_diagonal)


def by_label(
    compressors: Mapping[str, Compressor], labels: Any | Callable[[Any], Any]
) -> ByLabel:
    r"""Compress each leaf by the compressor that its label names.

    $C(a) = (C_1(a_1), \ldots, C_n(a_n))$ for the parts $a_p$ of equal label. Inner
    products are summed over the parts, so there is one Gram matrix, and the
    preconditioner is that of the full matrix over all parameters: for matrices of low
    rank, say, beside sparse embedding tables and vectors as they are.

    Args:
        compressors: The compressor of each label.
        labels: A tree prefix of the parameters with labels for leaves, or a function
            that makes one from the parameters, or from `jax.ShapeDtypeStruct`s in
            their place, as in `optax.partition`.

    Returns:
        An immutable compressor, for the `compressor` argument of the transformations.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A label is not among `compressors`, there are none, or one of them
            keeps a Gram matrix for each leaf. By `init` and `update`: a leaf has no
            label, or a compressor no leaf.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp
        >>> compressor = efcp_jax.by_label(
        ...     {"matrix": efcp_jax.top_k(0.25), "rest": efcp_jax.identity()},
        ...     {"w": "matrix", "b": "rest"})
        >>> tx = efcp_jax.error_feedback(compressor)
        >>> gradient = {"w": jnp.array([[4., 3.], [2., 1.]]), "b": jnp.array([2., 1.])}
        >>> update, _ = tx.update(gradient, tx.init(gradient))
        >>> print(update["w"].ravel(), update["b"])
        [4. 0. 0. 0.] [2. 1.]

    Notes:
        Memory and time are the sums of those of the parts, and a number for each part
        and row. Blocks of `top_k` hold leaves of one label only. Each part is stored at
        the scale of its own largest entry. The error is kept for all leaves, 4 bytes a
        parameter, unless every compressor is lossless.
    """
    if not isinstance(compressors, Mapping):
        raise TypeError(
            "`compressors` must be a dictionary of labels and compressors, got"
            f" {compressors!r}. Pass for example"
            " `{'table': efcp_jax.top_k(0.01), 'rest': efcp_jax.identity()}`."
        )
    if not compressors:
        raise ValueError(
            "`compressors` must hold a compressor for at least one label, got none."
        )
    for label, compressor in compressors.items():
        _check(label, compressor)
    if not callable(labels):
        labels = _prefix(labels, compressors)
    return ByLabel(tuple(compressors.items()), labels)


def _check(label: Any, compressor: Any) -> None:
    if not isinstance(label, str):
        raise TypeError(
            f"The labels of `compressors` must be strings, got {label!r} of type"
            f" {type(label).__name__}."
        )
    if not isinstance(compressor, Compressor) or isinstance(compressor, ByLabel):
        raise TypeError(
            f"`compressors[{label!r}]` must be what `identity`, `top_k` or `low_rank`"
            f" returns, got {compressor!r}. To divide a part further, give its leaves"
            " more labels."
        )
    if getattr(compressor, "block_diagonal", False):
        raise ValueError(
            f"`compressors[{label!r}]` keeps a Gram matrix for each leaf, but parts"
            " share one. Pass `block_diagonal=True` to `scale_by_mfac` or"
            " `scale_by_ggt`, which holds for all parts, or give every part a"
            " transformation of its own with `optax.partition`."
        )


def _prefix(labels: Any, known: Iterable[str]) -> Prefix:
    """Return a tree of `known` labels as pairs of path and label, or raise."""
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


def _members(
    labels: Prefix | Callable[[Any], Any], known: list[str], layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Return the leaves of each label, by their numbers, or raise.

    Going by paths lets a masked tree keep the labels of the whole. For a tree without
    leaves nothing is checked.
    """
    if not layout.leaves:
        return dict.fromkeys(known, ())
    leaves = [jax.ShapeDtypeStruct(leaf.whole, leaf.dtype) for leaf in layout.leaves]
    tree = layout.treedef.unflatten(leaves)
    given = broadcast(
        _prefix(labels(tree), known) if callable(labels) else labels,
        tree,
        lambda name, leaf: ValueError(
            f"`labels` has no entry for {name} of shape {leaf.shape}. Give it, or a"
            " tree above it, the name of a compressor."
        ),
    )
    found = {k: tuple(i for i, x in enumerate(given) if x == k) for k in known}
    for label, indices in found.items():
        if not indices:
            raise ValueError(
                f"`labels` gives no parameter to the compressor {label!r}. Leave it out"
                " of `compressors`, or label a parameter with it."
            )
    return found

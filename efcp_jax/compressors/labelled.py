"""Rows in parts of different representations: the arithmetic of labelled leaves."""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efcp_jax.compressors import many_grams
from efcp_jax.compressors.base import Compressor, Space
from efcp_jax.compressors.part_movers import LabelledMover
from efcp_jax.devices.layout import Layout


# What there is for each part, by its label.
Parts: TypeAlias = dict[str, Any]


class LabelledRow(NamedTuple):
    """Rows of all parts, each divided by the scale of its own largest entry.

    Attributes:
        parts: The row of every part, as its space keeps it.
        ratios: The scale of each part over that of the whole row, a power of two of at
            most 1, shape `(parts, 1)`; a window has `(parts, m)`. Kept apart, it costs
            no pass over anything, and narrow dtypes lose no small part beside a large
            one.
    """

    parts: Parts
    ratios: jax.Array


class Part(NamedTuple):
    """The leaves of one label.

    Attributes:
        label: The label.
        space: Their representation.
        indices: Which leaves of the whole tree they are.
    """

    label: str
    space: Space
    indices: tuple[int, ...]

    @classmethod
    def of(
        cls, label: str, compressor: Compressor, layout: Layout, indices: Any
    ) -> "Part":
        """Return the part of `layout` that `compressor` takes, a list of leaves."""
        leaves = tuple(layout.leaves[i] for i in indices)
        treedef = jax.tree.structure([0] * len(leaves))
        part = dataclasses.replace(layout, treedef=treedef, leaves=leaves)
        return cls(label, compressor.bind(part), indices)


@dataclasses.dataclass(frozen=True)
class LabelledSpace:
    """Vectors, rows and bases are those of the parts, by label."""

    layout: Layout
    parts: tuple[Part, ...]
    block_diagonal: bool = False

    def _divided(self, tree: chex.ArrayTree) -> Parts:
        leaves = jax.tree.leaves(tree)
        return {part.label: [leaves[i] for i in part.indices] for part in self.parts}

    def _united(self, trees: Parts) -> chex.ArrayTree:
        leaves: dict[int, jax.Array] = {}
        for part in self.parts:
            values = jax.tree.leaves(trees[part.label])
            leaves |= zip(part.indices, values, strict=True)
        return self.layout.treedef.unflatten([leaves[i] for i in range(len(leaves))])

    def _joined(self, made: Parts) -> tuple[LabelledRow, jax.Array]:
        """Return the rows and scales of the parts as one row and its scale."""
        scales = jnp.stack([scale for _, scale in made.values()])
        scale = jnp.max(scales)
        ratios = scales / jnp.where(scale > 0, scale, 1)  # powers of two: exact
        rows = {label: row for label, (row, _) in made.items()}
        return LabelledRow(rows, ratios[:, None]), scale

    def pack(self, tree: chex.ArrayTree) -> Parts:  # noqa: D102
        trees = self._divided(tree)
        return {p.label: p.space.pack(trees[p.label]) for p in self.parts}

    def unpack(self, vector: Parts) -> chex.ArrayTree:  # noqa: D102
        return self._united(
            {p.label: p.space.unpack(vector[p.label]) for p in self.parts}
        )

    def zeros(self):  # noqa: D102
        ratios = jnp.zeros((len(self.parts), 1), self.layout.dtype)
        return self._kept({p.label: p.space.zeros() for p in self.parts}, ratios)

    def specs(self):  # noqa: D102
        one: Any = PartitionSpec()
        return self._kept({p.label: p.space.specs() for p in self.parts}, one)

    def _kept(
        self, made: Parts, ratios: Any
    ) -> tuple[Parts, LabelledRow, Parts | None]:
        """Return vector, row and basis from those of each part."""
        vector, row, basis = (
            {label: each[i] for label, each in made.items()} for i in range(3)
        )
        return vector, LabelledRow(row, ratios), _bases(basis)

    def accumulate(self, tree, vector: Parts, accept):  # noqa: D102
        trees = self._divided(tree)
        return {
            p.label: p.space.accumulate(trees[p.label], vector[p.label], accept)
            for p in self.parts
        }

    def compress(self, vector: Parts, basis: Parts | None, scaled: bool):  # noqa: D102
        made, bases = {}, {}
        for label, space, _ in self.parts:
            old = (basis or {}).get(label)
            *made[label], bases[label] = space.compress(vector[label], old, scaled)
        return *self._joined(made), _bases(bases)

    def feed(self, tree, error: Parts, basis: Any, accept, count, scaled):  # noqa: D102
        made, errors, bases, trees = {}, {}, {}, self._divided(tree)
        for label, space, _ in self.parts:
            old = (basis or {}).get(label)
            *made[label], errors[label], bases[label] = space.feed(
                trees[label], error[label], old, accept, count, scaled
            )
        return *self._joined(made), errors, _bases(bases)

    def expand(self, row: LabelledRow) -> Parts:  # noqa: D102
        return {
            part.label: jax.tree.map(
                lambda x, ratio=ratio: x * ratio,
                part.space.expand(row.parts[part.label]),
            )
            for part, (ratio,) in zip(self.parts, row.ratios, strict=True)
        }

    def residual(self, vector: Parts, row: LabelledRow, scale: jax.Array):  # noqa: D102
        return {
            p.label: p.space.residual(
                vector[p.label], row.parts[p.label], scale * ratio
            )
            for p, (ratio,) in zip(self.parts, row.ratios, strict=True)
        }

    def inner(self, window: LabelledRow, row: LabelledRow) -> Any:  # noqa: D102
        products = {
            p.label: p.space.inner(window.parts[p.label], row.parts[p.label])
            for p in self.parts
        }
        return self._sum(products, window.ratios * row.ratios)

    def dot(self, window: LabelledRow, vector: Parts) -> Any:  # noqa: D102
        products = {
            p.label: p.space.dot(window.parts[p.label], vector[p.label])
            for p in self.parts
        }
        return self._sum(products, window.ratios)

    def _sum(self, products: Parts, ratios: jax.Array) -> Any:
        """Return inner products of the parts as there are Gram matrices."""
        products = self._times(products, ratios)
        if self.block_diagonal:
            return products
        return sum(products.values(), jnp.zeros((), self.layout.dtype))

    def _times(self, products: Parts, ratios: jax.Array) -> Parts:
        """Return what there is for the rows of each part, times its own ratios."""
        return {
            p.label: jax.tree.map(functools.partial(_by_row, own), products[p.label])
            for p, own in zip(self.parts, ratios, strict=True)
        }

    def _weights(self, coefficients: Any, ratios: jax.Array) -> Parts:
        """Return the coefficients of the rows of each part."""
        if not self.block_diagonal:
            coefficients = {p.label: coefficients for p in self.parts}
        return self._times(coefficients, ratios)

    def combine(self, window: LabelledRow, coefficients: Any):  # noqa: D102
        weights = self._weights(coefficients, window.ratios)
        return {
            p.label: p.space.combine(window.parts[p.label], weights[p.label])
            for p in self.parts
        }

    def update(self, window: LabelledRow, coefficients: Any):  # noqa: D102
        weights = self._weights(coefficients, window.ratios)
        return self._united(
            {
                p.label: p.space.update(window.parts[p.label], weights[p.label])
                for p in self.parts
            }
        )

    def grams(self, value: Any) -> Any:  # noqa: D102
        if not self.block_diagonal:
            return value
        return {p.label: p.space.grams(value) for p in self.parts}

    def each_gram(self, function, *, in_turn: bool = False):  # noqa: D102
        # Block-diagonal parts all keep arrays of Gram matrices.
        if not self.block_diagonal:
            return function
        return many_grams.of_all(function, in_turn)

    def mover(self, new: "LabelledSpace") -> LabelledMover:  # noqa: D102
        labels = [tuple((p.label, p.indices) for p in s.parts) for s in (self, new)]
        if labels[0] != labels[1]:
            raise ValueError(
                "`source` and `target` label parameters differently:"
                f" {labels[0]} and {labels[1]}."
            )
        pairs = zip(self.parts, new.parts, strict=True)
        movers = {a.label: a.space.mover(b.space) for a, b in pairs}
        return LabelledMover(movers, self.block_diagonal)


def _by_row(factors: jax.Array, products: jax.Array) -> jax.Array:
    """Return `products`, `(m,)` or those of several leaves, times one for each row."""
    return products * factors.reshape((1,) * (products.ndim - 1) + factors.shape)


def _bases(bases: Parts) -> Parts | None:
    """Return the bases of the parts that have one; None if none has."""
    return {k: basis for k, basis in bases.items() if basis is not None} or None

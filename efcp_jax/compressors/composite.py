"""Rows in parts, each of a representation of its own: the arithmetic."""

from collections.abc import Generator
import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax import passes
from efcp_jax.compressors.base import Compressor, of_grams
from efcp_jax.compressors.movers import PartMover
from efcp_jax.compressors.parts import Part, PartRow, Parts, leaf_parts
from efcp_jax.devices.collectives import together, vary_like
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.sections import zero_after
from efcp_jax.metrics.measured import Gradient


@dataclasses.dataclass(frozen=True)
class PartSpace:
    """Vectors, rows and bases are those of the parts, by name.

    The Gram matrices are kept apart if `block_diagonal`; else they are summed.
    """

    layout: Layout
    parts: tuple[Part, ...]
    block_diagonal: bool

    @property
    def counts(self) -> Any:  # noqa: D102
        return self._all_counts if self.block_diagonal else None

    @property
    def _all_counts(self) -> Parts:
        """The Gram matrices there are if nothing is summed."""
        return {p.name: p.space.counts or len(p.members) for p in self.parts}

    def _each(self, method: str, *given: Parts, **alike: Any) -> Parts:
        """Return what `Part.call` does, for each part."""
        made = {
            p.name: p.call(method, *(each.get(p.name) for each in given), **alike)
            for p in self.parts
        }
        return _at_once(made)

    def _apart(self, stored: Parts) -> Parts:
        return {p.name: p.apart(stored[p.name]) for p in self.parts}

    def _joined(self, made: Parts) -> Parts:
        return {p.name: p.joined(made[p.name]) for p in self.parts}

    def _divided(self, tree: chex.ArrayTree) -> Parts:
        leaves = jax.tree.leaves(tree)
        return {p.name: p.divided(leaves) for p in self.parts}

    def _united(self, trees: Parts) -> chex.ArrayTree:
        leaves: dict[int, jax.Array] = {}
        for part in self.parts:
            leaves |= part.placed(trees[part.name])
        return self.layout.treedef.unflatten([leaves[i] for i in range(len(leaves))])

    def pack(self, tree: chex.ArrayTree) -> Parts:  # noqa: D102
        return self._joined(self._each("pack", self._divided(tree)))

    def unpack(self, vector: Parts) -> chex.ArrayTree:  # noqa: D102
        return self._united(self._each("unpack", self._apart(vector)))

    def zeros(self):  # noqa: D102
        members = sum(len(p.members) for p in self.parts)
        ratios = jnp.zeros((members, 1), self.layout.dtype)
        vector, row, basis = _fields(self._each("zeros"))
        row = PartRow(self._joined(row), ratios)
        return self._joined(vector), row, _kept(basis)

    def specs(self):  # noqa: D102
        one: Any = PartitionSpec()
        vector, row, basis = _fields({p.name: p.space.specs() for p in self.parts})
        return vector, PartRow(row, one), _kept(basis)

    def compress(self, vector: Parts, basis: Any, scaled: bool):  # noqa: D102
        given = self._apart(vector), basis
        rows, scales, bases = _fields(self._each("compress", *given, scaled=scaled))
        return *self._row(rows, scales), _kept(bases)

    def feed(self, gradient, error: Parts, basis, accept, count, scaled):  # noqa: D102
        leaves, errors, made = jax.tree.leaves(gradient.tree), self._apart(error), {}
        alike = {"accept": accept, "count": count, "scaled": scaled}
        barrier = jax.lax.optimization_barrier
        for p in self.parts:
            given = Gradient(p.divided(leaves), None), errors[p.name], basis.get(p.name)
            fed = p.call("feed", *given, **alike)
            if not (self.layout.axes or isinstance(fed, Generator)):
                # Leaves are stacked when what is there for the part before is free.
                leaves, fed = passes.on_cpus(lambda *x: barrier(x), leaves, fed)
            made[p.name] = fed
        rows, scales, errors, bases = _fields(_at_once(made))
        return *self._row(rows, scales), self._joined(errors), _kept(bases)

    def _row(self, rows: Parts, scales: Parts) -> tuple[PartRow, jax.Array]:
        """Return the rows and scales of all members as one row and its scale."""
        each = jnp.concatenate([scale.reshape(-1) for scale in scales.values()])
        scale = jnp.max(each)
        ratios = each / jnp.where(scale > 0, scale, 1)  # powers of two: exact
        return PartRow(self._joined(rows), ratios[:, None]), scale

    def expand(self, row: PartRow) -> Parts:  # noqa: D102
        one = jnp.ones(1, self.layout.dtype)
        return self.combine(row, of_grams(self.counts, one))

    def inner(self, window: PartRow, row: PartRow) -> Any:  # noqa: D102
        given = self._apart(window.parts), self._apart(row.parts)
        return self._sum(self._each("inner", *given), window.ratios * row.ratios)

    def dot(self, window: PartRow, vector: Parts) -> Any:  # noqa: D102
        given = self._apart(window.parts), self._apart(vector)
        return self._sum(self._each("dot", *given), window.ratios)

    def _sum(self, products: Parts, ratios: jax.Array) -> Any:
        """Return inner products of the members as there are Gram matrices."""
        products = self._times(jax.tree.map(jnp.atleast_2d, products), ratios)
        if self.block_diagonal:
            return products
        return jnp.sum(jnp.concatenate(jax.tree.leaves(products)), axis=0)

    def _times(self, products: Parts, ratios: jax.Array) -> Parts:
        """Return what there is for the rows of each member, times its own ratios."""
        ends = np.cumsum([len(p.members) for p in self.parts])
        return {
            p.name: jax.tree.map(lambda x, own=own: x * own, products[p.name])
            for p, own in zip(self.parts, jnp.split(ratios, ends[:-1]), strict=True)
        }

    def combine(self, window: PartRow, coefficients: Any) -> Parts:  # noqa: D102
        weights = self._weights(window, coefficients)
        made = self._each("combine", self._apart(window.parts), weights)
        return self._joined(made)

    def update(self, window: PartRow, coefficients: Any):  # noqa: D102
        weights, trees = self._weights(window, coefficients), {}
        zero = jnp.zeros((), self.layout.dtype)
        for p in self.parts:
            own = jax.tree.map(lambda x, zero=zero: x + zero, weights[p.name])
            rows = p.apart(window.parts[p.name])
            trees[p.name] = p.call("update", rows, own)
            if not self.layout.axes and trees[p.name]:
                # What each part takes for the while is free for the next.
                wait = lambda zero, last: (zero_after(zero, last), last)
                run = passes.on_cpus if self.block_diagonal else lambda f, *x: f(*x)
                last = trees[p.name][-1].real
                zero, _ = run(wait, vary_like(last, zero), last)
        return self._united(trees)

    def _weights(self, window: PartRow, coefficients: Any) -> Parts:
        """Return the coefficients of the rows of each part, times their ratios."""
        if not self.block_diagonal:
            coefficients = of_grams(self._all_counts, coefficients)
        weights = self._times(coefficients, window.ratios)
        for part in self.parts:
            if part.alone and part.space.counts is None:
                weights[part.name] = weights[part.name][0]
        return weights

    def mover(self, new: "PartSpace") -> PartMover:  # noqa: D102
        return PartMover(self, new)


def each_leaf(compressor: Compressor, layout: Layout) -> PartSpace:
    """Return the space in which every leaf is compressed by itself."""
    parts = leaf_parts(compressor.bind, layout, range(len(layout.leaves)))
    return PartSpace(layout, tuple(parts), block_diagonal=True)


def _at_once(made: Parts) -> Parts:
    """Return what is made; collectives of all parts are asked for together."""
    routines = {name: x for name, x in made.items() if isinstance(x, Generator)}
    return made | dict(zip(routines, together(routines.values()), strict=True))


def _fields(made: Parts) -> tuple[Parts, ...]:
    """Return tuples of the parts as a tuple of what each part has."""
    fields = zip(*made.values(), strict=True)
    return tuple(dict(zip(made, field, strict=True)) for field in fields)


def _kept(bases: Parts) -> Parts:
    """Return what there is for the parts that carry anything between steps."""
    return {name: basis for name, basis in bases.items() if basis is not None}

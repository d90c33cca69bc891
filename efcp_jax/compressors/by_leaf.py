"""Rows in which every leaf stands for itself, for one Gram matrix each.

Leaves that are alike, in shape, dtype and placement, are one batch: the number of
kernels and the time to compile follow the number of different leaves.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efcp_jax.compressors import many_grams
from efcp_jax.compressors.base import Compressor, Space
from efcp_jax.compressors.groups import distinct
from efcp_jax.compressors.part_movers import LeafMover
from efcp_jax.devices.layout import Layout, Leaf


# Of each group, by its name: its leaves' arrays behind each other on the first axis.
Groups: TypeAlias = dict[str, Any]


class LeafRow(NamedTuple):
    """Rows of all leaves, each divided by the scale of its own largest entry.

    Attributes:
        groups: The rows of the leaves of each group, as its space keeps them.
        ratios: The scale of each leaf over that of the whole row, a power of two of at
            most 1, `(g, 1)` for g leaves; a window has `(g, m)`.
    """

    groups: Groups
    ratios: dict[str, Any]


class LeafGroup(NamedTuple):
    """Leaves that are alike.

    Attributes:
        name: The key of the group in the state.
        space: The representation of one of them.
        indices: Which leaves of the tree they are, in the order of the batch.
    """

    name: str
    space: Space
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ByLeaf:
    """A representation of each leaf by itself; made by `scoped`.

    Attributes:
        compressor: What every leaf is compressed by. It carries no basis.
    """

    compressor: Compressor

    lossless = False

    def bind(self, layout: Layout) -> "ByLeafSpace":
        """Return the space of all leaves of `layout`."""
        members: dict[Leaf, list[int]] = {}
        for index, leaf in enumerate(layout.leaves):
            members.setdefault(leaf, []).append(index)
        names = distinct(["x".join(map(str, leaf.whole)) or "1" for leaf in members])
        one = jax.tree.structure([0])
        groups = []
        for name, (leaf, indices) in zip(names, members.items(), strict=True):
            alone = dataclasses.replace(layout, treedef=one, leaves=(leaf,))
            space = self.compressor.bind(alone)
            groups.append(LeafGroup(name, space, tuple(indices)))
        return ByLeafSpace(layout, tuple(groups))


@dataclasses.dataclass(frozen=True)
class ByLeafSpace:
    """Vectors and rows are those of the leaves, group by group."""

    layout: Layout
    groups: tuple[LeafGroup, ...]

    def _each(self, function: Callable[..., Any], *given: Groups) -> Groups:
        """Return `function(space, *of_one_leaf)` of all leaves, at once in each group.

        Arrays have an axis of leaves in front.
        """
        return {
            group.name: jax.vmap(lambda *one, space=group.space: function(space, *one))(
                *(each[group.name] for each in given)
            )
            for group in self.groups
        }

    def _apart(self, groups: Groups) -> Groups:
        """Give the leaves an axis of their own, in front."""
        return {
            g.name: jax.tree.map(
                functools.partial(_divided, len(g.indices)), groups[g.name]
            )
            for g in self.groups
        }

    def _stack(self, tree: chex.ArrayTree) -> Groups:
        """Return the leaves of each group, stacked."""
        leaves = jax.tree.leaves(tree)
        return {g.name: jnp.stack([leaves[i] for i in g.indices]) for g in self.groups}

    def _unstack(self, groups: Groups) -> chex.ArrayTree:
        leaves: dict[int, jax.Array] = {}
        for group in self.groups:
            leaves |= zip(group.indices, jnp.unstack(groups[group.name]), strict=True)
        return self.layout.treedef.unflatten([leaves[i] for i in range(len(leaves))])

    def pack(self, tree: chex.ArrayTree) -> Groups:  # noqa: D102
        return _joined(self._each(lambda s, x: s.pack([x]), self._stack(tree)))

    def unpack(self, vector: Groups) -> chex.ArrayTree:  # noqa: D102
        apart = self._apart(vector)
        return self._unstack(self._each(lambda s, v: s.unpack(v)[0], apart))

    def zeros(self):  # noqa: D102
        vector, row, ratios = {}, {}, {}
        for name, space, indices in self.groups:
            count, (one, entries, _) = len(indices), space.zeros()
            many = lambda x, count=count: jnp.zeros(
                (count * x.shape[0], *x.shape[1:]), x.dtype
            )
            vector[name], row[name] = jax.tree.map(many, (one, entries))
            ratios[name] = jnp.zeros((count, 1), self.layout.dtype)
        return vector, LeafRow(row, ratios), None

    def specs(self):  # noqa: D102
        specs = {g.name: g.space.specs() for g in self.groups}
        one: Any = PartitionSpec()
        vector, row = ({k: x[i] for k, x in specs.items()} for i in range(2))
        return vector, LeafRow(row, dict.fromkeys(specs, one)), None

    def accumulate(self, tree, vector: Groups, accept):  # noqa: D102
        add = lambda s, x, v: s.accumulate([x], v, accept)
        return _joined(self._each(add, self._stack(tree), self._apart(vector)))

    def compress(self, vector: Groups, basis: None, scaled: bool):  # noqa: D102
        made = self._each(
            lambda s, v: s.compress(v, None, scaled)[:2], self._apart(vector)
        )
        return *self._row(made), basis

    def feed(self, tree, error: Groups, basis: None, accept, count, scaled):  # noqa: D102
        made = self._each(
            lambda s, x, e: s.feed([x], e, None, accept, count, scaled)[:3],
            self._stack(tree),
            self._apart(error),
        )
        errors = _joined({name: each[2] for name, each in made.items()})
        return *self._row(made), errors, basis

    def _row(self, made: Groups) -> tuple[LeafRow, jax.Array]:
        """Return the rows and scales of the leaves as one row and its scale."""
        largest = [jnp.max(each[1]) for each in made.values()]
        scale = jnp.max(jnp.stack(largest or [jnp.zeros((), self.layout.dtype)]))
        ratio = lambda own: own / jnp.where(scale > 0, scale, 1)  # powers of two: exact
        rows = _joined({name: each[0] for name, each in made.items()})
        return LeafRow(
            rows, {k: ratio(each[1])[:, None] for k, each in made.items()}
        ), scale

    def expand(self, row: LeafRow) -> Groups:  # noqa: D102
        def expand(space: Space, row: Any, ratio: jax.Array) -> Any:
            return jax.tree.map(lambda x: x * ratio[0], space.expand(row))

        return _joined(self._each(expand, self._apart(row.groups), row.ratios))

    def residual(self, vector: Groups, row: LeafRow, scale: jax.Array):  # noqa: D102
        return _joined(
            self._each(
                lambda s, v, r, ratio: s.residual(v, r, scale * ratio[0]),
                self._apart(vector),
                self._apart(row.groups),
                row.ratios,
            )
        )

    def inner(self, window: LeafRow, row: LeafRow) -> Groups:  # noqa: D102
        products = self._each(
            lambda s, w, r: s.inner(w, r),
            self._apart(window.groups),
            self._apart(row.groups),
        )
        ratios = row.ratios
        return {k: x * window.ratios[k] * ratios[k] for k, x in products.items()}

    def dot(self, window: LeafRow, vector: Groups) -> Groups:  # noqa: D102
        products = self._each(
            lambda s, w, v: s.dot(w, v),
            self._apart(window.groups),
            self._apart(vector),
        )
        return {k: x * window.ratios[k] for k, x in products.items()}

    def combine(self, window: LeafRow, coefficients: Groups) -> Groups:  # noqa: D102
        return _joined(
            self._each(
                lambda s, w, c, ratio: s.combine(w, c * ratio),
                self._apart(window.groups),
                coefficients,
                window.ratios,
            )
        )

    def update(self, window: LeafRow, coefficients: Groups):  # noqa: D102
        return self.unpack(self.combine(window, coefficients))

    def grams(self, value: Any) -> Groups:  # noqa: D102
        counts = {g.name: len(g.indices) for g in self.groups}
        return many_grams.repeated(counts, value)

    def each_gram(self, function, *, in_turn: bool = False):  # noqa: D102
        return many_grams.of_all(function, in_turn)

    def mover(self, new: "ByLeafSpace") -> LeafMover:  # noqa: D102
        return LeafMover(self, new)


def _divided(count: int, x: jax.Array) -> jax.Array:
    return x.reshape(count, -1, *x.shape[1:])


def _joined(groups: Groups) -> Groups:
    """Undo `ByLeafSpace._apart`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)

"""Parts of a tree: leaves that are compressed together.

A part is the leaves of one label, those of equal matrices, or one leaf. Leaves that
stand each for itself and are alike are the *members* of one part, side by side: the
number of kernels and the time to compile follow the number of different leaves.
"""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from efcp_jax.compressors.base import Space
from efcp_jax.devices.layout import Layout, Leaf


# What there is for each part, by its name. In a state the arrays of its members lie
# behind each other along the first axis, on each device.
Parts: TypeAlias = dict[str, Any]


class PartRow(NamedTuple):
    """Rows of all members of all parts, each divided by its own largest entry's scale.

    Attributes:
        parts: The rows of every part, as its space keeps them.
        ratios: The scale of each member over that of the whole row, a power of two of
            at most 1, shape `(members, 1)`; a window has `(members, m)`. Kept apart, it
            costs no pass over anything, and narrow dtypes lose no small part beside a
            large one.
    """

    parts: Parts
    ratios: jax.Array


class Part(NamedTuple):
    """Leaves that are compressed together, or several alike that are not.

    Attributes:
        name: The key of the part in the state.
        space: The representation of one member. That of several has one Gram matrix,
            and carries nothing between steps.
        members: Which leaves of the whole tree each of them is.
    """

    name: str
    space: Space
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        name: str,
        bind: Callable[[Layout], Any],
        layout: Layout,
        *members: tuple[int, ...],
    ) -> "Part":
        """Return the part of these members, whose space `bind` makes."""
        leaves = tuple(layout.leaves[i] for i in members[0])
        treedef = jax.tree.structure([0] * len(leaves))
        one = dataclasses.replace(layout, treedef=treedef, leaves=leaves)
        return cls(name, bind(one), members)

    @property
    def alone(self) -> bool:
        """Whether there is one member, whose arrays have no axis of members."""
        return len(self.members) == 1

    @property
    def counts(self) -> Any:
        """The Gram matrices there are if nothing is summed."""
        return self.space.counts or len(self.members)

    def divided(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """Return the leaves of one member, of a tree, stacked if there are several."""
        each = [[leaves[i] for i in member] for member in self.members]
        if self.alone:
            return each[0]
        return [jnp.stack(alike) for alike in zip(*each, strict=True)]

    def placed(self, values: list[jax.Array]) -> dict[int, jax.Array]:
        """Undo `divided`: return what there is for each leaf, by its number."""
        each = [values] if self.alone else zip(*map(jnp.unstack, values), strict=True)
        pairs = zip(self.members, each, strict=True)
        return {i: x for member, one in pairs for i, x in zip(member, one, strict=True)}

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """Return `function` of what is given for each member, of all at once."""
        if self.alone:
            return function(*given)
        return jax.vmap(function, axis_size=len(self.members))(*given)

    def apart(self, stored: Any) -> Any:
        """Give the members in the arrays of a state an axis of their own, in front."""
        if self.alone:
            return stored
        count = len(self.members)
        return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), stored)

    def joined(self, made: Any) -> Any:
        """Undo `apart`."""
        if self.alone:
            return made
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)


def leaf_parts(
    bind: Callable[[Layout], Any], layout: Layout, indices: Iterable[int]
) -> tuple[Part, ...]:
    """Return parts in which each of some leaves stands for itself; one at least.

    A part is named by the shape of its leaves; one of the same shape that lies on the
    devices in another way, or is of another dtype, gets a number behind it.
    """
    alike: dict[Leaf, list[tuple[int, ...]]] = {}
    for index in indices:
        alike.setdefault(layout.leaves[index], []).append((index,))
    names = distinct([leaf.whole for leaf in alike])
    pairs = zip(names, alike.values(), strict=True)
    parts = [Part.of(name, bind, layout, *members) for name, members in pairs]
    return tuple(parts) or (Part.of("0", bind, layout, ()),)


def distinct(shapes: list[tuple[int, ...]]) -> list[str]:
    """Return shapes as words, with a number, from 2, behind those that came before."""
    alike: dict[str, int] = {}
    names = []
    for shape in shapes:
        name = "x".join(map(str, shape)) or "1"
        number = alike[name] = alike.get(name, 0) + 1
        names.append(name if number == 1 else f"{name}-{number}")
    return names

"""Parts of a tree: leaves that are compressed together.

A part is the leaves of one label, those of equal matrices, or one leaf. Leaves that
stand each for itself and are alike are the *members* of one part: the number of kernels
and the time to compile follow the number of different leaves. In a state their arrays
lie behind each other along the first axis, on each device.
"""

from collections.abc import Iterable
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from efcp_jax.compressors.base import Space
from efcp_jax.devices.layout import Layout


# What there is for each part, by its name.
Parts: TypeAlias = dict[str, Any]


class PartRow(NamedTuple):
    """Rows of all members of all parts, each divided by its own largest entry's scale.

    The ratios are those scales over that of the whole row, powers of two of at most 1,
    `(members, 1)`; a window has `(members, m)`. Kept apart, they cost no pass over
    anything, and narrow dtypes lose no small part beside a large one.
    """

    parts: Parts
    ratios: jax.Array


class Part(NamedTuple):
    """The leaves of the whole tree that each member is, and the space of one member.

    That of several has one Gram matrix, and carries nothing between steps.
    """

    name: str
    space: Space
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, name: str, bind: Any, layout: Layout, *members: Any) -> "Part":
        """Return the part of these members, whose space `bind` makes."""
        leaves = tuple(layout.leaves[i] for i in members[0])
        treedef = jax.tree.structure([0] * len(leaves))
        one = dataclasses.replace(layout, treedef=treedef, leaves=leaves)
        return cls(name, bind(one), members)

    @property
    def alone(self) -> bool:
        """Whether there is one member, whose arrays have no axis of members."""
        return len(self.members) == 1

    def divided(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """Return the leaves of one member, of a tree, stacked if there are several."""
        each = [[leaves[i] for i in member] for member in self.members]
        return each[0] if self.alone else jax.tree.map(lambda *x: jnp.stack(x), *each)

    def placed(self, values: list[jax.Array]) -> dict[int, jax.Array]:
        """Undo `divided`: return what there is for each leaf, by its number."""
        each = [values] if self.alone else zip(*map(jnp.unstack, values), strict=True)
        both = (itertools.chain(*them) for them in (self.members, each))
        return dict(zip(*both, strict=True))

    def call(self, method: str, *given: Any, **alike: Any) -> Any:
        """Return what a method makes of what is given for each member, and of `alike`.

        Of several members all have an axis of members in front.
        """
        function = functools.partial(getattr(self.space, method), **alike)
        if not self.alone:
            function = jax.vmap(function, axis_size=len(self.members))
        return function(*given)

    def apart(self, stored: Any) -> Any:
        """Give the members in the arrays of a state an axis of their own, in front."""
        count = len(self.members)
        cut = lambda x: x.reshape(count, -1, *x.shape[1:])
        return stored if self.alone else jax.tree.map(cut, stored)

    def joined(self, made: Any) -> Any:
        """Undo `apart`."""
        join = lambda x: x.reshape(-1, *x.shape[2:])
        return made if self.alone else jax.tree.map(join, made)


def leaf_parts(bind: Any, layout: Layout, indices: Iterable[int]) -> list[Part]:
    """Return parts in which each of some leaves stands for itself; one at least."""
    groups = layout.alike(indices, lambda leaf: (leaf.whole, leaf))
    parts = [
        Part.of(name, bind, layout, *((i,) for i in found))
        for name, found in groups.items()
    ]
    return parts or [Part.of("0", bind, layout, ())]

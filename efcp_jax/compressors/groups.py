"""Leaves whose matrices are equal, as one batch of matrices.

The number of kernels of a step and the time to compile it follow the number of groups,
not of leaves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efcp_jax.compressors.matrix import Matrix
from efcp_jax.devices.layout import Layout


class Group(NamedTuple):
    """The leaves that share one `Matrix`.

    Attributes:
        name: The key of the group in the state.
        matrix: How each of them is factorised.
        indices: Which leaves they are, in the order in which they are stacked.
    """

    name: str
    matrix: Matrix
    indices: tuple[int, ...]

    def stack(self, matrices: list[jax.Array], layout: Layout) -> jax.Array:
        """Return this device's part of the leaves, from the matrices of all leaves.

        Args:
            matrices: The matrix of each leaf of the tree, on this device.
            layout: The leaves of the tree.

        Returns:
            Array of shape `(g, rows, cols)`, or `(g, cols)` for leaves kept whole.
        """
        size = self.matrix.cols if self.matrix.whole else self.matrix.rows

        def own(value: jax.Array) -> jax.Array:
            value = value.reshape(-1) if self.matrix.whole else value
            if missing := size * layout.ways(layout.split) - len(value):
                value = jnp.pad(value, [(0, missing), (0, 0)][: value.ndim])
            return layout.own(value, axis=0)

        # Each leaf is cut before they are stacked, for only what is kept to be copied.
        return jnp.stack([own(matrices[i]) for i in self.indices])

    def split(
        self, values: jax.Array, layout: Layout, start: int = 0
    ) -> list[jax.Array]:
        """Return the matrices of the leaves from `start` on; undoes `stack`."""
        values = layout.gather(values, axis=1)
        indices = self.indices[start : start + len(values)]
        leaves = [layout.leaves[i] for i in indices]
        size = leaves[0].size if self.matrix.whole else leaves[0].matrix_shape[0]
        return [
            value.reshape(leaf.matrix_shape)
            for value, leaf in zip(jnp.unstack(values[:, :size]), leaves, strict=True)
        ]

    def runs(self, entries: int) -> list[tuple[int, int]]:
        """Return start and length of runs of about `entries` entries, one at least."""
        count = len(self.indices)
        each = max(1, entries // (self.matrix.rows * self.matrix.cols))
        each = -(-count // -(-count // each))  # of about equal length
        return [(i, min(each, count - i)) for i in range(0, count, each)]


def groups_of(layout: Layout, rank: int) -> tuple[Group, ...]:
    """Return the groups of the leaves of `layout`, in the order of their first leaves.

    A group is named by the shape of its matrices; one of the same shape that lies on
    the devices in another way gets a number, from 2, behind the shape.
    """
    members: dict[Matrix, list[int]] = {}
    for index, leaf in enumerate(layout.leaves):
        members.setdefault(Matrix.of(leaf, layout, rank), []).append(index)
    names = distinct([matrix.name for matrix in members])
    pairs = zip(names, members.items(), strict=True)
    return tuple(Group(name, matrix, tuple(at)) for name, (matrix, at) in pairs)


def distinct(names: list[str]) -> list[str]:
    """Return `names` with a number, from 2, behind those that came before."""
    alike: dict[str, int] = {}
    numbered = []
    for name in names:
        number = alike[name] = alike.get(name, 0) + 1
        numbered.append(name if number == 1 else f"{name}-{number}")
    return numbered

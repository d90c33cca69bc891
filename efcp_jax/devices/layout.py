"""How a tree of parameters is seen by one device: as real matrices, leaf by leaf.

Every leaf becomes a matrix of its last axis against all others: a scalar is `(1, 1)`,
a vector `(1, n)`, a kernel `(..., c)` is `(prod(...), c)`, and a complex leaf holds its
real and imaginary parts side by side, `(rows, 2 c)`. On several devices they are those
of the device's own shards. A `Layout` is made from shapes wherever a function is
traced, and never enters the state.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.devices.collectives import joined
from efcp_jax.numerics import cast, widest


# Smaller runs of leaves than this many entries are not worth a kernel.
_SMALLEST_RUN = 65_536

# Into about how many runs the leaves are taken to be looked at.
_PIECES = 32


class Leaf(NamedTuple):
    """One leaf as held by one device."""

    shape: tuple[int, ...]  # of the device's shard
    dtype: np.dtype  # of its update
    partition: tuple[tuple[str, ...], ...]  # the mesh axes that split each array axis
    whole: tuple[int, ...]  # the shape of all shards together, less what is padding

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Mesh axes that split all but the last array axis."""
        return tuple(name for names in self.partition[:-1] for name in names)

    @property
    def col_axes(self) -> tuple[str, ...]:
        """Mesh axes that split the last array axis."""
        return self.partition[-1] if self.partition else ()

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that split the leaf."""
        return self.row_axes + self.col_axes

    @property
    def parts(self) -> int:
        """How many real numbers an entry is."""
        return 2 if jnp.issubdtype(self.dtype, jnp.complexfloating) else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the real matrix that stands for the shard."""
        columns = self.shape[-1] if self.shape else 1
        return math.prod(self.shape[:-1]), self.parts * columns

    @property
    def size(self) -> int:
        """Count of real numbers in the shard."""
        return self.parts * math.prod(self.shape)

    @property
    def whole_size(self) -> int:
        """Count of real numbers in the whole leaf."""
        return self.parts * math.prod(self.whole)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The leaves of one tree on one device, and the mesh the step is spread over."""

    treedef: Any  # a PyTreeDef
    leaves: tuple[Leaf, ...]
    dtype: np.dtype  # the working dtype, float32 or float64
    mesh: tuple[tuple[str, int], ...] = ()  # names and sizes of all its axes
    # Those that split no leaf. The working vectors are divided among them and the
    # update is gathered from them.
    split: tuple[str, ...] = ()
    # Whether the step has chosen the division itself. Then no array whose entries are
    # in another order than on one device may have the same shape as there, since the
    # shapes of a state tell which of both has made it.
    chosen: bool = False

    @functools.cached_property
    def kinds(self) -> dict[str, tuple[int, ...]]:
        """The leaves that are alike in everything, by the name of their shape."""
        return self.alike(range(len(self.leaves)), lambda leaf: (leaf.whole, leaf))

    def alike(
        self, indices: Iterable[int], key: Callable[[Leaf], tuple[Any, Any]]
    ) -> dict[str, tuple[int, ...]]:
        """Return the leaves of equal `key`, a shape and what else must be alike.

        Their name is the shape, and from the second key of that shape a number.
        """
        groups: dict[Any, list[int]] = {}
        for index in indices:
            groups.setdefault(key(self.leaves[index]), []).append(index)
        counts, named = collections.Counter(), {}
        for (shape, _), found in groups.items():
            name = "x".join(map(str, shape)) or "1"
            counts[name] += 1
            number = f"-{counts[name]}" if counts[name] > 1 else ""
            named[name + number] = tuple(found)
        return named

    def by_kind(self, leaves: list[Any]) -> list[list[Any]]:
        """Return what there is for each leaf, in lists of those that are alike."""
        return [[leaves[i] for i in indices] for indices in self.kinds.values()]

    @property
    def order(self) -> list[int]:
        """The leaves as they are laid end to end: equal ones beside each other."""
        return [*itertools.chain(*self.kinds.values())]

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes the step is spread over."""
        return tuple(name for name, _ in self.mesh)

    def ways(self, axes: tuple[str, ...]) -> int:
        """Return the number of devices along `axes`."""
        sizes = dict(self.mesh)
        return math.prod(sizes[name] for name in axes)

    def copies(self, leaf: Leaf) -> int:
        """Return how many devices hold the same part of `leaf` in their windows."""
        owned = {*leaf.axes, *self.split}
        return self.ways(tuple(name for name in self.axes if name not in owned))

    def sum(self, value: Any) -> Any:
        """Sum a tree of one dtype over all devices; the one collective of a step."""
        return joined(lax.psum, self.axes, value)

    def own(self, array: jax.Array, axis: int) -> jax.Array:
        """Return this device's part of `array`, divided along `axis` among `split`."""
        if not self.split:
            return array
        part = array.shape[axis] // self.ways(self.split)
        start = lax.axis_index(self.split) * part
        return lax.dynamic_slice_in_dim(array, start, part, axis)

    def gather(self, array: jax.Array, axis: int) -> jax.Array:
        """Undo `own`: join the parts of all devices of `split` along `axis`."""
        if not self.split:
            return array
        return lax.all_gather(array, self.split, axis=axis, tiled=True)

    def runs(self, parts: int) -> list[list[int]]:
        """Return the indices of the leaves in runs of about one of `parts` of them all.

        A larger leaf is a run by itself, not copied to stand beside others; small ones
        are taken together, so that a large tree does not become a large program.
        """
        limit = max(_SMALLEST_RUN, sum(leaf.size for leaf in self.leaves) // parts)
        runs: list[list[int]] = []
        room = 0
        for index in self.order:
            size = self.leaves[index].size
            if not runs or size > room:
                runs.append([])
                room = limit
            runs[-1].append(index)
            room -= size
        return runs

    def pieces(self, tree: chex.ArrayTree) -> Iterator[jax.Array]:
        """Yield the entries of `tree`, laid end to end, a run of leaves at a time."""
        matrices = self.matrices(tree)
        for run in self.runs(_PIECES):
            yield jnp.concatenate([matrices[i].reshape(-1) for i in run])

    def wide(self, tree: chex.ArrayTree) -> list[jax.Array]:
        """Return the leaves of `tree` in the working dtype, real or complex."""
        kinds = self.dtype, widest(self.dtype, jnp.complex64)
        leaves = zip(jax.tree.leaves(tree), self.leaves, strict=True)
        return [jnp.asarray(x).astype(kinds[leaf.parts - 1]) for x, leaf in leaves]

    def flat(self, tree: chex.ArrayTree) -> list[jax.Array]:
        """Return the leaves of `tree` end to end, complex ones as `matrices` are."""
        pairs = zip(jax.tree.leaves(tree), self.matrices(tree), strict=True)
        # The others are widened where they are read.
        arrays = [w if jnp.iscomplexobj(x) else jnp.asarray(x) for x, w in pairs]
        return [arrays[i].reshape(-1) for i in self.order]

    def matrices(self, tree: chex.ArrayTree) -> list[jax.Array]:
        """Return the leaves of `tree` as real matrices in the working dtype."""
        matrices = []
        for value, leaf in zip(self.wide(tree), self.leaves, strict=True):
            if leaf.parts == 2:
                value = jnp.atleast_1d(value)
                value = jnp.concatenate([value.real, value.imag], axis=-1)
            matrices.append(value.reshape(leaf.matrix_shape))
        return matrices

    def tree(self, matrices: list[jax.Array]) -> chex.ArrayTree:
        """Undo `matrices`."""
        values = []
        for matrix, leaf in zip(matrices, self.leaves, strict=True):
            if leaf.parts == 2:
                matrix = lax.complex(*jnp.split(matrix, 2, axis=1))
            values.append(matrix.reshape(leaf.shape))
        return self.treedef.unflatten(values)

    def cast(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Return `tree` in the dtypes of the leaves: where updates are rounded."""
        leaves = zip(jax.tree.leaves(tree), self.leaves, strict=True)
        return self.treedef.unflatten(cast(x, leaf.dtype) for x, leaf in leaves)

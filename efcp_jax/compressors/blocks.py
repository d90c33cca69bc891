"""A tree of parameters as one array of blocks, `(blocks, size)` or in tiles.

The leaves are laid end to end and cut into large blocks, or into tiles of small ones,
`(tiles, size, lanes)`, whose columns are the blocks: what is at one place of all blocks
of a tile lies side by side. The last is padded with zeros. On several devices, leaves
held by different numbers of devices start at separate blocks or tiles, so that equal
ones stay equal on all devices that hold them.
"""

import dataclasses
import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax import passes
from efcp_jax.devices.layout import Layout
from efcp_jax.numerics import indexed, saturate
from efcp_jax.passes.forms import LANES


# On a mesh where some leaves are replicated, one block for everything would pad the
# smallest group of leaves to the size of the largest. Blocks of this size bound the
# padding and keep offsets in 16 bits.
_MESH_BLOCK = 65_536


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Where each leaf lies in the array of blocks of `size`.

    There are `count` tiles of `lanes` blocks on this device, or if None blocks. Groups
    are the indices of their leaves and a number of those, and weights for each one over
    how many devices hold it, or None where all are held once.
    """

    layout: Layout
    size: int
    lanes: int | None
    count: int
    groups: tuple[tuple[tuple[int, ...], int], ...]
    weights: np.ndarray | None

    counts = None

    @classmethod
    def of(cls, layout: Layout, size: int | None, most: int | None = None) -> "Blocks":
        """Lay out leaves in blocks of `size`, or if None in the largest that there are.

        If `most` is given in tiles of as many blocks, or of all if there are fewer.
        """
        members: dict[int, tuple[int, ...]] = {}
        for index in layout.order:
            copies = layout.copies(layout.leaves[index])
            members[copies] = *members.get(copies, ()), index
        copies, indices = zip(*sorted(members.items() or [(1, ())]), strict=True)
        totals = [sum(layout.leaves[i].size for i in group) for group in indices]
        largest, given = max(1, *totals), size
        ways = layout.ways(layout.split)
        if size is None:
            size = -(-largest // ways)
            size = size if len(copies) == 1 else min(size, _MESH_BLOCK)
        # Cut down to the leaves, never to a device's share of them, so that data
        # parallelism selects the same entries as one device.
        unit, size, lanes = _cut_down(largest, size, most)
        counts = [-(-n // unit) for n in totals]
        share = max(1, -(-sum(counts) // ways))
        if layout.chosen and any(leaf.axes for leaf in layout.leaves):
            whole = max(1, sum(leaf.whole_size for leaf in layout.leaves))
            alone, *alike = _cut_down(whole, given or whole, most)
            count = share * layout.ways(layout.axes)
            share += [size, lanes] == alike and count == -(-whole // alone)
        # The last group takes what makes the count divide among devices.
        counts[-1] += share * ways - sum(counts)
        # Not where it would be of ones: there may be millions of blocks.
        weights = np.repeat(1 / np.array(copies), counts) if copies != (1,) else None
        groups = tuple(zip(indices, counts, strict=True))
        return cls(layout, size, lanes, share, groups, weights)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a vector."""
        return (self.count, self.size, self.lanes or 1)[: 3 if self.lanes else 2]

    @property
    def unit(self) -> int:
        """Entries of a tile, or of a block."""
        return self.size * (self.lanes or 1)

    @property
    def flat(self) -> bool:
        """Whether leaves lie end to end, on one device, in reach of an index."""
        return not self.layout.axes and self.count * self.unit <= indexed()

    @property
    def spec(self) -> PartitionSpec:
        """How an array of blocks is divided among devices: along its first axis."""
        return PartitionSpec(self.layout.axes or None)

    def pack(self, tree: chex.ArrayTree) -> jax.Array:
        """Return this device's blocks of `tree`."""
        matrices = self.layout.matrices(tree)
        pieces = []
        for indices, count in self.groups:
            pieces += [matrices[i].reshape(-1) for i in indices]
            used = sum(self.layout.leaves[i].size for i in indices)
            pieces.append(jnp.zeros(count * self.unit - used, self.layout.dtype))
        flat = jnp.concatenate(pieces)
        if self.lanes and self.lanes < LANES:
            flat = passes.turned_together(flat)
        return self.layout.own(flat.reshape(-1, *self.shape[1:]), axis=0)

    def unpack(self, vector: jax.Array) -> chex.ArrayTree:
        """Return the tree of this device's blocks, and those of all along `split`."""
        flat = self.layout.gather(vector, axis=0).reshape(-1)
        matrices: dict[int, jax.Array] = {}
        start = 0
        for indices, count in self.groups:
            offset = start
            for i in indices:
                leaf = self.layout.leaves[i]
                piece = lax.slice_in_dim(flat, offset, offset + leaf.size)
                matrices[i] = piece.reshape(leaf.matrix_shape)
                offset += leaf.size
            start += count * self.unit
        return self.layout.tree([matrices[i] for i in range(len(matrices))])

    def accumulate(
        self, tree: chex.ArrayTree, blocks: jax.Array, accept: jax.Array
    ) -> jax.Array:
        """Return `blocks` plus those of `tree` if `accept`, in place on one device."""
        if not self.flat:
            total = saturate(blocks + self.pack(tree), blocks.dtype)
            return jnp.where(accept, total, blocks)
        pieces = functools.partial(self.layout.pieces, tree)
        packed = lambda: self.pack(tree).reshape(-1)
        flat = passes.add(blocks.reshape(-1), pieces, packed, accept)
        return flat.reshape(blocks.shape)

    def zero(self) -> jax.Array:
        """Return the zero vector."""
        return jnp.zeros(self.shape, self.layout.dtype)

    @property
    def shares(self) -> jax.Array | None:
        """What a sum over all devices counts of each block or tile, or None for all."""
        if self.weights is None:
            return None
        weights = jnp.asarray(self.weights, self.layout.dtype)
        # With idle axes every device owns a different run of the weights.
        return self.layout.own(weights, axis=0)


def _cut_down(
    largest: int, size: int, lanes: int | None
) -> tuple[int, int, int | None]:
    """Return the entries of a tile, the size and the lanes for `largest` entries."""
    size = min(size, largest)
    size = -(-size // -(-size // indexed()))  # equal parts that an index reaches across
    lanes = lanes and min(lanes, -(-largest // size))
    return size * (lanes or 1), size, lanes

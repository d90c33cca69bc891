"""A tree of parameters as one array of blocks, `(blocks, size)`.

The leaves are laid end to end and cut into blocks; the last block is padded with
zeros. On several devices, leaves held by different numbers of devices start at
separate blocks, so that equal blocks stay equal on all devices that hold them.
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


# On a mesh where some leaves are replicated, one block for everything would pad the
# smallest group of leaves to the size of the largest. Blocks of this size bound the
# padding and keep offsets in 16 bits.
_MESH_BLOCK = 65_536


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Where each leaf lies in the array of blocks: `count` on this device, of `size`.

    Groups are the indices of their leaves and a number of blocks, and weights for each
    block one over how many devices hold it, or None where every block is held once.
    """

    layout: Layout
    size: int
    count: int
    groups: tuple[tuple[tuple[int, ...], int], ...]
    weights: np.ndarray | None

    counts = None

    @classmethod
    def of(cls, layout: Layout, size: int | None, tile: int = 1) -> "Blocks":
        """Lay out leaves in blocks of `size`, or if None in the largest that there are.

        The number of blocks of every device is a multiple of `tile`, or of itself if
        there are fewer.
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
        # A given size is cut down to the leaves, never to a device's share of them, so
        # that data parallelism selects the same entries as one device.
        size = _in_reach(min(size, largest))
        counts = [-(-n // size) for n in totals]
        share = _tiled(max(1, -(-sum(counts) // ways)), tile)
        if layout.chosen and any(leaf.axes for leaf in layout.leaves):
            devices = layout.ways(layout.axes)
            alike = (share * devices, size) == _on_one_device(layout, given, tile)
            share = _tiled(share + 1, tile) if alike else share
        # The last group takes the blocks that make the count divide among devices.
        counts[-1] += share * ways - sum(counts)
        # Not where it would be of ones: there may be millions of blocks.
        weights = np.repeat(1 / np.array(copies), counts) if copies != (1,) else None
        groups = tuple(zip(indices, counts, strict=True))
        return cls(layout, size, share, groups, weights)

    @property
    def flat(self) -> bool:
        """Whether leaves lie end to end, on one device, in reach of an index."""
        return not self.layout.axes and self.count * self.size <= indexed()

    @property
    def spec(self) -> PartitionSpec:
        """How an array of blocks is divided among devices: along its first axis."""
        return PartitionSpec(self.layout.axes or None)

    def pack(self, tree: chex.ArrayTree) -> jax.Array:
        """Return this device's blocks of `tree`, shape `(count, size)`."""
        matrices = self.layout.matrices(tree)
        pieces = []
        for indices, count in self.groups:
            pieces += [matrices[i].reshape(-1) for i in indices]
            used = sum(self.layout.leaves[i].size for i in indices)
            pieces.append(jnp.zeros(count * self.size - used, self.layout.dtype))
        blocks = jnp.concatenate(pieces).reshape(-1, self.size)
        return self.layout.own(blocks, axis=0)

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
            start += count * self.size
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
        return jnp.zeros((self.count, self.size), self.layout.dtype)

    @property
    def shares(self) -> jax.Array | None:
        """What a sum over all devices counts of each block here, or None for all."""
        if self.weights is None:
            return None
        weights = jnp.asarray(self.weights, self.layout.dtype)
        # With idle axes every device owns a different run of the weights.
        return self.layout.own(weights, axis=0)


def _tiled(count: int, tile: int) -> int:
    """Return `count` blocks filled up to whole tiles, which are of `tile` at most."""
    return count + -count % min(tile, count)


def _in_reach(size: int) -> int:
    """Return the size of the equal parts that an index reaches across."""
    return -(-size // -(-size // indexed()))


def _on_one_device(layout: Layout, size: int | None, tile: int) -> tuple[int, int]:
    """Return how many blocks one device alone would have, and their size."""
    total = max(1, sum(leaf.whole_size for leaf in layout.leaves))
    size = _in_reach(min(size or total, total))
    return _tiled(-(-total // size), tile), size

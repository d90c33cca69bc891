"""A tree of parameters as one array of blocks, `(blocks, size)`.

The leaves are laid end to end and cut into blocks; the last block is padded with
zeros. On several devices, leaves held by different numbers of devices start at
separate blocks, so that equal blocks stay equal on all devices that hold them.
"""

from collections.abc import Callable
import dataclasses

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax.devices.layout import Layout
from efcp_jax.numerics import saturate
from efcp_jax.passes.overwrite import overwrite


# On a mesh where some leaves are replicated, one block for everything would pad the
# smallest group of leaves to the size of the largest. Blocks of this size bound the
# padding and keep offsets in 16 bits.
_MESH_BLOCK = 65_536

# Above this, entries cannot be counted in the 32 bits of an index.
_LARGEST_INDEX = 2**31 - 1

# Into about how many runs the leaves are taken to be filled with the update. Each is a
# loop to compile, and what is copied unless it is a single leaf.
_RUNS = 6


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Where each leaf lies in the array of blocks.

    Attributes:
        layout: The tree's leaves on this device.
        size: Entries a block.
        groups: For each group, the indices of its leaves and its number of blocks.
        weights: For each of this device's blocks, one over the number of devices that
            hold it; None where every block is held once.
    """

    layout: Layout
    size: int
    groups: tuple[tuple[tuple[int, ...], int], ...]
    weights: np.ndarray | None

    @classmethod
    def of(cls, layout: Layout, size: int | None) -> "Blocks":
        """Lay out the leaves of `layout`; `size=None` asks for the largest blocks."""
        members: dict[int, list[int]] = {}
        for index, leaf in enumerate(layout.leaves):
            members.setdefault(layout.copies(leaf), []).append(index)
        copies = sorted(members)
        totals = [sum(layout.leaves[i].size for i in members[c]) for c in copies]
        largest = max([*totals, 1])
        if size is None:
            size = -(-largest // layout.ways(layout.split))
            size = size if len(copies) <= 1 else min(size, _MESH_BLOCK)
        # A given size is cut down to the leaves, never to a device's share of them, so
        # that data parallelism selects the same entries as one device.
        size = min(size, largest)
        counts = [-(-n // size) for n in totals] or [1]
        # The last group takes the blocks that make the count divide among devices.
        counts[-1] += -sum(counts) % layout.ways(layout.split)
        counts[-1] += layout.ways(layout.split) * (not any(counts))
        members_in_order = [tuple(members[c]) for c in copies] or [()]
        weights = np.repeat([1.0 / c for c in copies] or [1.0], counts)
        return cls(
            layout=layout,
            size=size,
            groups=tuple(zip(members_in_order, counts, strict=True)),
            weights=None if np.all(weights == 1.0) else weights,
        )

    @property
    def count(self) -> int:
        """Number of blocks of this device."""
        total = sum(count for _, count in self.groups)
        return total // self.layout.ways(self.layout.split)

    @property
    def flat(self) -> bool:
        """Whether the leaves lie end to end, all on one device, in reach of an index.

        Then runs of leaves are read and written without the blocks around them.
        """
        return not self.layout.axes and self.count * self.size <= _LARGEST_INDEX

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

    def unpack(self, blocks: jax.Array) -> chex.ArrayTree:
        """Return the tree whose blocks, over all devices of `split`, are `blocks`."""
        flat = self.layout.gather(blocks, axis=0).reshape(-1)
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

        def select(flat: jax.Array) -> jax.Array:
            total = saturate(flat + self.pack(tree).reshape(-1), flat.dtype)
            return jnp.where(accept, total, flat)

        def add_in_place(flat: jax.Array) -> jax.Array:
            start = 0
            # XLA updates a slice where it lies if it is read at the same place, which
            # it can tell only while the place is not a constant.
            zero = lax.optimization_barrier(jnp.int32(0))
            for piece in self.layout.pieces(tree):
                at = zero + start
                old = lax.dynamic_slice_in_dim(flat, at, piece.size)
                new = saturate(old + piece, flat.dtype)
                flat = lax.dynamic_update_slice_in_dim(flat, new, at, axis=0)
                start += piece.size
            return flat

        flat = blocks.reshape(-1)
        if not self.flat:
            return select(flat).reshape(blocks.shape)
        return overwrite(accept, add_in_place, select, flat).reshape(blocks.shape)

    def tree(
        self, entries: Callable[[int, int, jax.Array], jax.Array]
    ) -> chex.ArrayTree:
        """Return the tree whose leaves, laid end to end, are given by `entries`.

        On one device. The entries are asked for in runs of leaves, one after the other,
        so that never all of them are copied; a leaf that is a run by itself is not
        copied at all. `entries(start, stop, zero)` gets a zero from which it has to
        start, so that it cannot be run before the copies of the last run are made.
        """
        matrices: list[jax.Array] = []
        start, zero = 0, jnp.zeros((), self.layout.dtype)
        for run in self.layout.runs(_RUNS):
            leaves = [self.layout.leaves[i] for i in run]
            stop = start + sum(leaf.size for leaf in leaves)
            ends = np.cumsum([leaf.size for leaf in leaves])
            pieces = jnp.split(entries(start, stop, zero), ends[:-1])
            zero = _zero_after(zero, *pieces)
            matrices += [
                piece.reshape(leaf.matrix_shape)
                for piece, leaf in zip(pieces, leaves, strict=True)
            ]
            start = stop
        return self.layout.tree(matrices)

    def share(self, blocks: jax.Array) -> jax.Array:
        """Weigh `blocks` so that a sum over all devices counts each entry once."""
        if self.weights is None:
            return blocks
        weights = jnp.asarray(self.weights, self.layout.dtype)
        # With idle axes every device owns a different run of the weights.
        return self.layout.own(weights, axis=0)[:, None] * blocks


def _zero_after(*arrays: jax.Array) -> jax.Array:
    """Return a zero that can only be computed from all of `arrays`."""
    # No compiler finds out that the lowest bit is never below zero.
    firsts = jnp.stack([array.reshape(-1)[0] for array in arrays if array.size])
    bits = lax.bitcast_convert_type(firsts, f"int{8 * firsts.dtype.itemsize}")
    return jnp.minimum(jnp.min(bits & 1), 0).astype(firsts.dtype)

"""Rows of kept entries: the arithmetic of the sparse representation."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from efcp_jax.compressors.base import feed
from efcp_jax.compressors.blocks import Blocks
from efcp_jax.compressors.movers import SparseMover
from efcp_jax.devices.layout import Layout
from efcp_jax.numerics import saturate
from efcp_jax.passes import row_scale
from efcp_jax.passes.entries import SparseRow, Storage, Stored
from efcp_jax.passes.forms import LANES, LARGEST, Form


@dataclasses.dataclass(frozen=True)
class SparseSpace:
    """Rows of the k largest entries of every block; global top-k is one block.

    Attributes:
        blocks: Where each leaf lies in the array of blocks.
        passes: What is done with entries, and how they are stored.
    """

    blocks: Blocks
    passes: Form

    @property
    def storage(self) -> Storage:
        """How entries are stored."""
        return self.passes.storage

    counts = None

    @classmethod
    def of(
        cls, layout: Layout, size: int | None, density: float, dtype: Any
    ) -> "SparseSpace":
        """Return the space of blocks of `size` that keeps a share of `density`."""
        small = size is not None and size <= LARGEST
        blocks = Blocks.of(layout, size, LANES if small else 1)
        if blocks.size <= LARGEST and not small:  # cut down to a small model
            blocks = Blocks.of(layout, blocks.size, LANES)
        kept = min(blocks.size, max(1, round(density * blocks.size)))
        storage = Storage.of(jnp.dtype(dtype), blocks.size)
        tile = min(LANES, blocks.count) if blocks.size <= LARGEST else None
        return cls(blocks, Form(blocks.size, kept, storage, tile))

    @property
    def layout(self) -> Layout:  # noqa: D102
        return self.blocks.layout

    def pack(self, tree: chex.ArrayTree) -> jax.Array:  # noqa: D102
        return self.blocks.pack(tree)

    def unpack(self, vector: jax.Array) -> chex.ArrayTree:  # noqa: D102
        return self.blocks.unpack(vector)

    def zeros(self) -> tuple[jax.Array, Stored, None]:  # noqa: D102
        count = self.blocks.count
        vector = jnp.zeros((count, self.blocks.size), self.layout.dtype)
        return vector, self.storage.zeros(self.passes.row_shape(count)), None

    def specs(self):  # noqa: D102
        spec: Any = self.blocks.spec
        return spec, self.storage.each(spec), None

    def accumulate(self, tree, vector, accept):  # noqa: D102
        return self.blocks.accumulate(tree, vector, accept)

    def compress(self, vector: jax.Array, basis: None, scaled: bool):  # noqa: D102
        del basis
        values, offsets = self.passes.select(vector)
        return *self._row(values, offsets, scaled), None

    def feed(self, tree, error, basis, accept, count, scaled):  # noqa: D102
        def by_parts(tree, error, accept, count) -> Any:
            return feed(self, tree, error, basis, accept, count, scaled)[:3]

        row, scale, rest = self.passes.feed(
            tree,
            error,
            accept,
            count,
            by_parts=by_parts,
            finish=lambda values, offsets: self._row(values, offsets, scaled),
            gradient=self.pack,
            sections=self.blocks.sections,
            dtype=self.layout.dtype,
        )
        return row, scale, rest, basis

    def _row(self, values: jax.Array, offsets: jax.Array, scaled: bool) -> Any:
        # The largest entry is among those that are kept.
        scale, inverse = row_scale(values, scaled)
        return self.storage.store(values * inverse, offsets), scale

    def expand(self, row: Stored) -> jax.Array:  # noqa: D102
        zeros = jnp.zeros((self.blocks.count, self.blocks.size), self.layout.dtype)
        values, offsets = self.storage.load(row, self.layout.dtype)
        return self.passes.residual(zeros, -values, offsets)

    def residual(self, vector: jax.Array, row: Stored, scale: jax.Array):  # noqa: D102
        values, offsets = self.storage.load(row, self.layout.dtype)
        # Rounded up, the largest entries may overflow.
        return self.passes.residual(
            vector, saturate(scale * values, vector.dtype), offsets
        )

    def inner(self, window: Stored, row: Stored) -> jax.Array:  # noqa: D102
        values, offsets = self.storage.load(row, self.layout.dtype)
        if (shares := self.blocks.shares) is not None:
            values = values * self.passes.from_blocks(shares[:, None])
        return self.passes.inner(window, SparseRow(values, offsets))

    def dot(self, window: Stored, vector: jax.Array) -> jax.Array:  # noqa: D102
        shares = self.blocks.shares
        vector = vector if shares is None else vector * shares[:, None]
        return self.passes.dot(window, vector)

    def combine(self, window: Stored, coefficients: jax.Array):  # noqa: D102
        (flat,) = self.passes.combine(window, coefficients, self.blocks.whole)
        return flat.reshape(-1, self.blocks.size)

    def update(self, window: Stored, coefficients: jax.Array):  # noqa: D102
        if not self.blocks.flat:
            return self.unpack(self.combine(window, coefficients))
        return self.blocks.tree(
            self.passes.combine(window, coefficients, self.blocks.runs)
        )

    def mover(self, new: "SparseSpace") -> SparseMover:  # noqa: D102
        return SparseMover(self, new)

"""Sparse rows: the entries of largest magnitude of each block of the gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efcp_jax import _validate
from efcp_jax.compressors.base import Space, feed
from efcp_jax.compressors.blocks import Blocks
from efcp_jax.compressors.composite import each_leaf
from efcp_jax.compressors.movers import SparseMover
from efcp_jax.devices.layout import Layout
from efcp_jax.devices.sections import Piece, piece_of
from efcp_jax.metrics.measured import Gradient
from efcp_jax.numerics import saturate
from efcp_jax.passes import row_scale
from efcp_jax.passes.entries import DTYPES, SparseRow, Storage, Stored
from efcp_jax.passes.forms import LANES, LARGEST, Form


# Into about how many runs the leaves are taken to be filled with the update. Each is a
# loop to compile, and what is copied unless it is a single leaf.
_RUNS = 6


@dataclasses.dataclass(frozen=True)
class SparseSpace(Blocks):
    """Rows of the k largest entries of every block; global top-k is one block."""

    passes: Form

    @property
    def storage(self) -> Storage:  # noqa: D102
        return self.passes.storage

    def zeros(self) -> tuple[jax.Array, Stored, None]:  # noqa: D102
        shape = self.passes.shape(self.count, self.passes.kept)
        return self.zero(), self.storage.zeros(shape), None

    def specs(self):  # noqa: D102
        return self.spec, self.storage.each(self.spec), None

    def compress(self, vector: jax.Array, basis: None, scaled: bool):  # noqa: D102
        return *self._row(*self.passes.select(vector), scaled), basis

    def feed(self, gradient, error, basis, accept, count, scaled):  # noqa: D102
        def by_parts(gradient, error, accept, count) -> Any:
            return feed(self, gradient, error, basis, accept, count, scaled)[:3]

        row, scale, rest = self.passes.feed(
            gradient,
            error,
            accept,
            count,
            by_parts=by_parts,
            finish=lambda values, offsets: self._row(values, offsets, scaled),
            pieces=self._pieces,
            dtype=self.layout.dtype,
        )
        return row, scale, rest, basis

    def _pieces(self, gradient: Gradient) -> list[Piece]:
        if self.flat:
            return gradient.pieces(self.layout)
        return [piece_of(self.pack(gradient.tree).reshape(-1))]

    def _row(self, values: jax.Array, offsets: jax.Array, scaled: bool) -> Any:
        # The largest entry is among those that are kept.
        scale, inverse = row_scale(values, scaled)
        return self.storage.store(values * inverse, offsets), scale

    def expand(self, row: Stored) -> jax.Array:  # noqa: D102
        values, offsets = self.storage.load(row, self.layout.dtype)
        return self.passes.residual(self.zero(), -values, offsets)

    def residual(self, vector: jax.Array, row: Stored, scale: jax.Array):  # noqa: D102
        values, offsets = self.storage.load(row, self.layout.dtype)
        # Rounded up, the largest entries may overflow.
        values = saturate(scale * values, vector.dtype)
        return self.passes.residual(vector, values, offsets)

    def inner(self, window: Stored, row: Stored) -> jax.Array:  # noqa: D102
        values, offsets = self.storage.load(row, self.layout.dtype)
        return self.passes.inner(window, SparseRow(self._weighted(values), offsets))

    def dot(self, window: Stored, vector: jax.Array) -> jax.Array:  # noqa: D102
        return self.passes.dot(window, self._weighted(vector))

    def _weighted(self, array: jax.Array) -> jax.Array:
        shares, behind = self.shares, [1] * (array.ndim - 1)
        return array if shares is None else array * shares.reshape(-1, *behind)

    def combine(self, window: Stored, coefficients: jax.Array):  # noqa: D102
        one = [[self.count * self.unit]]
        return self.passes.combine(window, coefficients, one)[0].reshape(self.shape)

    def update(self, window: Stored, coefficients: jax.Array):  # noqa: D102
        if not self.flat:
            return self.unpack(self.combine(window, coefficients))
        leaves = self.layout.leaves
        runs = [[leaves[i].size for i in run] for run in self.layout.runs(_RUNS)]
        made = self.passes.combine(window, coefficients, runs)
        found = dict(zip(self.layout.order, made, strict=True))
        pairs = ((found[i], leaf) for i, leaf in enumerate(leaves))
        return self.layout.tree([x.reshape(leaf.matrix_shape) for x, leaf in pairs])

    def mover(self, new: "SparseSpace") -> SparseMover:  # noqa: D102
        return SparseMover(self, new)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Configuration of the sparse representation; made by `top_k`."""

    density: float = 0.01
    block_size: int | None = None
    value_dtype: np.dtype | None = None
    block_diagonal: bool = dataclasses.field(default=False, repr=False)

    lossless = False

    def bind(self, layout: Layout) -> Space:
        """Return the sparse space for trees of `layout`."""
        if self.block_diagonal:
            return each_leaf(dataclasses.replace(self, block_diagonal=False), layout)
        size = self.block_size
        small = size is not None and size <= LARGEST
        blocks = Blocks.of(layout, size, LANES if small else None)
        if blocks.size <= LARGEST and not small:  # cut down to a small model
            blocks = Blocks.of(layout, blocks.size, LANES)
        kept = min(blocks.size, max(1, round(self.density * blocks.size)))
        dtype = jnp.dtype(self.value_dtype or layout.dtype)
        storage = Storage.of(dtype, blocks.size)
        form = Form(blocks.size, kept, storage, blocks.lanes)
        return SparseSpace(**vars(blocks), passes=form)


def top_k(
    density: float = 0.01,
    *,
    block_size: int | None = None,
    value_dtype: jax.typing.DTypeLike | None = None,
) -> TopK:
    r"""Keep the entries of largest magnitude, over all parameters or in each block.

    $C(a)_i = a_i$ if $|a_i|$ is among the $k$ largest of its block, else 0, with
    $k = \max(1, \mathrm{round}(\mathrm{density} \cdot B))$.

    Args:
        density: Share of the entries kept, in (0, 1]. 0.01 keeps one in a hundred; 1.0
            keeps all of them, which costs more than `identity`. A density that would
            keep less than one entry of a block keeps one.
        block_size: Entries a block, at least 1. The parameters are laid end to end and
            cut into blocks of this many, and the selection is made in each block by
            itself: several times faster than over all parameters, with offsets of 1 or
            2 bytes up to 256 or 65,536. Up to 256 nothing is gathered or scattered, and
            accelerators are fast as well; powers of two suit them best. Such a block
            has every 128th entry of a run, which 128 blocks share, or all where there
            are less; a larger block is a run. None makes one block of all parameters.
            Blocks larger than the model are cut down to it.
        value_dtype: Dtype of the stored values. None stores them in the working dtype
            (float32, or float64 for float64 parameters). `jnp.bfloat16` makes an entry
            3 bytes (4 in blocks of more than 256), `jnp.int8` and `jnp.float8_e4m3fn`
            make it 2, in blocks of up to 256 only. Error feedback carries the rounding.

    Returns:
        An immutable compressor, for the `compressor` argument of the transformations.

    Raises:
        TypeError: An argument is of the wrong type, or traced.
        ValueError: An argument is out of range, or values of 8 bits meet blocks of more
            than 256 entries.

    Examples:
        >>> import efcp_jax
        >>> efcp_jax.top_k(0.05, block_size=4096)
        TopK(density=0.05, block_size=4096, value_dtype=None)

    References:
        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        A window takes m k (bytes a value + bytes an offset) bytes a block. A step costs
        one selection over the gradient and two passes over the window. For blocks of up
        to 256 entries the first compares each entry with the k of the new row, and the
        second with all B places of its block on accelerators; CPUs scatter it. For
        larger blocks CPUs and GPUs gather and scatter m k entries a block, GPUs row
        after row, so that runs repeat bit for bit, and TPUs compare m k^2 and multiply
        2 m k B numbers a block: prefer small blocks there, and windows whose m k is a
        multiple of 8, which else are copied. On many devices None is a block on each.

        Values of 8 bits are multiples of a power of two that each row has for every
        tile of 128 blocks, 2 bytes. int8 has steps of 1/64 to 1/128 of the largest of
        the tile, and values below half a step become 0; float8_e4m3fn rounds by up to
        1/16 of each value, down to 2^-17 of the largest; bfloat16 by up to 1/256.
        Small models trained alike with all three.
    """
    if block_size is not None:
        block_size = _validate.positive_int("block_size", block_size)
    return TopK(
        density=_validate.number_now("density", density),
        block_size=block_size,
        value_dtype=_validate.floating_dtype(
            "value_dtype",
            value_dtype,
            narrow=DTYPES if block_size and block_size <= LARGEST else (),
            remedy=(
                "Those of 8 bits, jnp.int8 and jnp.float8_e4m3fn, have a scale for each"
                " tile of small blocks, and there are no tiles of larger ones: pass"
                f" `block_size={LARGEST}` or less with them, got"
                f" `block_size={block_size}`."
            ),
        ),
    )

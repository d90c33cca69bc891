"""Sparse rows: the entries of largest magnitude of each block of the gradient."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax import _validate
from efcp_jax.compressors._blocks import Blocks
from efcp_jax.layout import Layout


# Below this size of a group the selection in two levels does not pay.
_SMALLEST_GROUP = 8

# Entries of the window processed at a time. On CPUs a loop round takes about as long as
# a thousand entries; on accelerators a chunk must fill the device, and temporaries of
# its size stay small against memory.
_CPU_CHUNK = 4096
_ACCELERATOR_CHUNK = 1 << 24


class SparseRow(NamedTuple):
    """The kept entries of every block.

    Attributes:
        values: The entries, shape `(blocks, k)`; a window has `(blocks, m, k)`.
        offsets: Their positions inside the block, of the same shape, in the smallest
            unsigned type that holds the block size.
    """

    values: jax.Array
    offsets: jax.Array


@dataclasses.dataclass(frozen=True)
class TopK:
    """Configuration of the sparse representation; made by `top_k`.

    Attributes:
        density: Share of the entries kept.
        block_size: Entries a block; None for a single block.
        value_dtype: Dtype of the stored values; None for the working dtype.
    """

    density: float = 0.01
    block_size: int | None = None
    value_dtype: np.dtype | None = None

    lossless = False

    def bind(self, layout: Layout) -> "SparseSpace":
        """Return the sparse space for trees of `layout`."""
        blocks = Blocks.of(layout, self.block_size)
        return SparseSpace(
            blocks=blocks,
            kept=min(blocks.size, max(1, round(self.density * blocks.size))),
            dtype=jnp.dtype(self.value_dtype or layout.dtype),
        )


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
            2 bytes up to 256 or 65,536. None makes one block of all parameters.
            Blocks larger than the model are cut down to it.
        value_dtype: Floating dtype of the stored values. None stores them in the
            working dtype (float32, or float64 for float64 parameters);
            `jnp.bfloat16` makes an entry 4 bytes, and error feedback carries the
            rounding over to the next step.

    Returns:
        An immutable compressor, for the `compressor` argument of the transformations.

    Raises:
        TypeError: An argument is of the wrong type, or traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax
        >>> efcp_jax.top_k(0.05, block_size=4096)
        TopK(density=0.05, block_size=4096, value_dtype=None)

    References:
        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        A window takes m k (bytes a value + bytes an offset) bytes a block. A step costs
        one selection over the gradient, m k gathers and m k scattered additions a
        block. Over several devices, one block means one block a device.
    """
    return TopK(
        density=_validate.fraction("density", density),
        block_size=(
            None
            if block_size is None
            else _validate.positive_int("block_size", block_size)
        ),
        value_dtype=_validate.floating_dtype("value_dtype", value_dtype),
    )


def offset_dtype(block_size: int) -> np.dtype:
    """Return the smallest dtype that holds every offset of a block."""
    for dtype in (jnp.uint8, jnp.uint16):
        if block_size - 1 <= jnp.iinfo(dtype).max:
            return jnp.dtype(dtype)
    return jnp.dtype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class SparseSpace:
    """Rows of `SparseRow`; global top-k is the case of one block."""

    blocks: Blocks
    kept: int
    dtype: np.dtype

    @property
    def layout(self) -> Layout:  # noqa: D102
        return self.blocks.layout

    def pack(self, tree: chex.ArrayTree) -> jax.Array:  # noqa: D102
        return self.blocks.pack(tree)

    def unpack(self, vector: jax.Array) -> chex.ArrayTree:  # noqa: D102
        return self.blocks.unpack(vector)

    def zeros(self) -> tuple[jax.Array, SparseRow, None]:  # noqa: D102
        count, size = self.blocks.count, self.blocks.size
        vector = jnp.zeros((count, size), self.layout.dtype)
        shape = (count, self.kept)
        row = SparseRow(
            jnp.zeros(shape, self.dtype), jnp.zeros(shape, offset_dtype(size))
        )
        return vector, row, None

    def specs(self):  # noqa: D102
        spec: Any = self.blocks.spec
        return spec, SparseRow(spec, spec), None

    def compress(self, vector: jax.Array, basis: None):  # noqa: D102
        del basis
        offsets = largest(vector, self.kept)
        values = jnp.take_along_axis(vector, offsets, axis=1)
        offsets = offsets.astype(offset_dtype(self.blocks.size))
        return SparseRow(values.astype(self.dtype), offsets), None

    def expand(self, row: SparseRow) -> jax.Array:  # noqa: D102
        block = jnp.arange(self.blocks.count, dtype=jnp.int32)[:, None]
        vector = jnp.zeros((self.blocks.count, self.blocks.size), self.layout.dtype)
        return vector.at[block, row.offsets.astype(jnp.int32)].set(
            row.values.astype(vector.dtype), unique_indices=True
        )

    def residual(self, vector: jax.Array, row: SparseRow, scale: jax.Array):  # noqa: D102
        # k entries a block change, so the vector is updated where it lies.
        block = jnp.arange(self.blocks.count, dtype=jnp.int32)[:, None]
        return vector.at[block, row.offsets.astype(jnp.int32)].add(
            -scale * row.values.astype(vector.dtype), unique_indices=True
        )

    def inner(self, window: SparseRow, row: SparseRow) -> jax.Array:  # noqa: D102
        dtype, size = self.layout.dtype, self.blocks.size
        values = self.blocks.share(row.values.astype(dtype))

        def add(total: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
            part = _blocks_at(window, start, chunk)
            at = lambda leaf: lax.dynamic_slice_in_dim(leaf, start, chunk)
            vector = _scatter_add(size, at(row.offsets)[:, None], at(values)[:, None])
            products = part.values.astype(dtype) * _gather(vector, part.offsets)
            return total + jnp.sum(products, axis=(0, 2))

        zeros = jnp.zeros(window.values.shape[1], dtype)
        return _sweep(window, zeros, add)

    def combine(self, window: SparseRow, coefficients: jax.Array):  # noqa: D102
        dtype = coefficients.dtype

        def write(vector: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
            part = _blocks_at(window, start, chunk)
            entries = part.values.astype(dtype) * coefficients[:, None]
            summed = _scatter_add(self.blocks.size, part.offsets, entries)
            return lax.dynamic_update_slice_in_dim(vector, summed, start, axis=0)

        zeros = jnp.zeros((self.blocks.count, self.blocks.size), dtype)
        return _sweep(window, zeros, write)

    def grams(self, value: jax.Array) -> jax.Array:  # noqa: D102
        return value


def largest(vector: jax.Array, kept: int) -> jax.Array:
    """Return the offsets of the `kept` entries of largest magnitude of every row.

    Among equal magnitudes the first come first, as in `lax.top_k`. The entries that are
    kept lie in the `kept` groups of largest maximum: each of those groups has an entry
    that comes before all entries of the other groups. So two selections, among the
    maxima of groups and among the entries of the groups kept, replace one among all
    entries.

    Args:
        vector: Shape `(blocks, size)`.
        kept: Number of entries kept of each block.

    Returns:
        Array of shape `(blocks, kept)`, int32.
    """
    count, size = vector.shape
    # A power of two near the root of size / kept makes both selections small.
    group = 2 ** max(0, round(math.log2(size / kept) / 2))
    if group < _SMALLEST_GROUP:
        return lax.top_k(jnp.abs(vector), kept)[1]
    groups = -(-size // group)
    padded = jnp.pad(vector, [(0, 0), (0, groups * group - size)])
    # Bits of a magnitude order like the magnitude, and integers reduce several times
    # faster than floats, whose maximum has to look for NaN.
    bits = lax.bitcast_convert_type(jnp.abs(padded), f"int{8 * vector.dtype.itemsize}")
    peaks = jnp.max(bits.reshape(count, groups, group), axis=2)
    peaks = lax.bitcast_convert_type(peaks, vector.dtype)
    _, chosen = lax.top_k(peaks, kept)
    first = jnp.sort(chosen, axis=1)[:, :, None] * group
    offsets = (first + jnp.arange(group, dtype=jnp.int32)).reshape(count, -1)
    # The padding of the last group loses to every entry, even to zeros.
    entries = jnp.take_along_axis(
        jnp.abs(vector), offsets, axis=1, mode="fill", fill_value=-1
    )
    _, places = lax.top_k(entries, kept)
    return jnp.take_along_axis(offsets, places, axis=1)


def _sweep(
    window: SparseRow,
    start: jax.Array,
    step: Callable[[jax.Array, jax.Array, int], jax.Array],
) -> jax.Array:
    """Fold `step(carry, first block, number of blocks)` over the blocks of `window`.

    On a CPU one block at a time, or a few small ones, so that what a chunk touches
    stays in the cache and temporaries are of the size of a chunk. Accelerators take
    chunks large enough to keep them busy.
    """
    count, rows, kept = window.values.shape

    def fold(chunk: int) -> jax.Array:
        whole = count // chunk
        body = lambda i, carry: step(carry, i * chunk, chunk)
        carry = lax.fori_loop(0, whole, body, start)
        if count % chunk:
            carry = step(carry, jnp.int32(whole * chunk), count % chunk)
        return carry

    chunk = lambda entries: min(count, max(1, entries // (rows * kept)))
    small, large = chunk(_CPU_CHUNK), chunk(_ACCELERATOR_CHUNK)
    if small == large:
        return fold(small)
    return lax.platform_dependent(cpu=lambda: fold(small), default=lambda: fold(large))


def _blocks_at(window: SparseRow, start: jax.Array, chunk: int) -> SparseRow:
    """Return `chunk` blocks of every array of `window`."""
    # XLA on CPUs slices bfloat16 by way of float32. Without a barrier that depends on
    # the round it would hoist the conversion out of the loop: a float32 window.
    return jax.tree.map(
        lambda leaf: lax.dynamic_slice_in_dim(
            lax.optimization_barrier((leaf, start))[0], start, chunk
        ),
        window,
    )


def _gather(vector: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return the entries of `vector`, `(c, size)`, at `offsets`, `(c, m, k)`."""
    offsets = offsets.astype(jnp.uint32)
    take = lambda entries, index: entries.at[index].get(mode="promise_in_bounds")
    if vector.shape[0] == 1:  # one block at a time: no index for the block
        return take(vector[0], offsets[0])[None]
    return jax.vmap(take)(vector, offsets)


def _scatter_add(size: int, offsets: jax.Array, entries: jax.Array) -> jax.Array:
    """Return the sums of `entries`, `(c, m, k)`, by `offsets`; shape `(c, size)`."""
    chunk = entries.shape[0]
    offsets = offsets.astype(jnp.uint32).reshape(chunk, -1)
    entries = entries.reshape(chunk, -1)
    zeros = jnp.zeros(size, entries.dtype)
    add = lambda index, each: zeros.at[index].add(each, mode="promise_in_bounds")
    if chunk == 1:
        return add(offsets[0], entries[0])[None]
    return jax.vmap(add)(offsets, entries)

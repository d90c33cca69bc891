"""Sparse rows: the entries of largest magnitude of each block of the gradient."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax import _validate
from efcp_jax.compressors._blocks import LARGEST_INDEX, Blocks
from efcp_jax.compressors._selection import largest
from efcp_jax.layout import Layout


# Entries of the window processed at a time. On CPUs what a chunk touches should stay in
# the cache, and a loop round takes as long as a few thousand entries; on accelerators a
# chunk must fill the device, and temporaries of its size stay small against memory.
_CPU_INNER = 1 << 15
_CPU_COMBINE = 1 << 12
_ACCELERATOR = 1 << 24


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

    def accumulate(self, tree, vector, accept):  # noqa: D102
        return self.blocks.accumulate(tree, vector, accept)

    def compress(self, vector: jax.Array, basis: None, factor: chex.Numeric = 1.0):  # noqa: D102
        del basis
        # The same entries are largest whatever the factor.
        offsets = largest(vector, self.kept)
        values = jnp.take_along_axis(vector, offsets, axis=1) * factor
        offsets = offsets.astype(offset_dtype(self.blocks.size))
        return SparseRow(values.astype(self.dtype), offsets), None

    def expand(self, row: SparseRow) -> jax.Array:  # noqa: D102
        values = row.values.astype(self.layout.dtype)
        return _scatter_add(self.blocks.size, row.offsets, values)

    def residual(self, vector: jax.Array, row: SparseRow, scale: jax.Array):  # noqa: D102
        # k entries a block change, so the vector is updated where it lies.
        block = jnp.arange(self.blocks.count, dtype=jnp.int32)[:, None]
        return vector.at[block, row.offsets.astype(jnp.int32)].add(
            -scale * row.values.astype(vector.dtype), unique_indices=True
        )

    def inner(self, window: SparseRow, row: SparseRow) -> jax.Array:  # noqa: D102
        dtype, size = self.layout.dtype, self.blocks.size
        weighed = SparseRow(self.blocks.share(row.values.astype(dtype)), row.offsets)

        def products(start: Any, chunk: int) -> jax.Array:
            part, newest = (
                _blocks_at(window, start, chunk),
                _slice(weighed, start, chunk),
            )
            vector = _scatter_add(size, newest.offsets, newest.values)
            return part.values.astype(dtype) * _gather(vector, part.offsets)

        count, rows, kept = window.values.shape

        def on_cpu() -> jax.Array:
            # Sums of whole chunks entry by entry are vectorised; a sum along a row
            # would wait for each addition.
            chunk = _chunk(window, _CPU_INNER)
            add = lambda total, start, chunk: total + products(start, chunk)
            whole = count // chunk * chunk
            zeros = jnp.zeros((chunk, rows, kept), dtype)
            total = jnp.sum(_sweep(whole, chunk, zeros, add), axis=(0, 2))
            if whole < count:
                total += jnp.sum(products(whole, count - whole), axis=(0, 2))
            return total

        def elsewhere() -> jax.Array:
            add = lambda total, start, chunk: (
                total + jnp.sum(products(start, chunk), axis=(0, 2))
            )
            chunk = _chunk(window, _ACCELERATOR)
            return _sweep(count, chunk, jnp.zeros(rows, dtype), add)

        return lax.platform_dependent(cpu=on_cpu, default=elsewhere)

    def combine(self, window: SparseRow, coefficients: jax.Array):  # noqa: D102
        sums, count = self._sums(window, coefficients), self.blocks.count
        zeros = jnp.zeros((count, self.blocks.size), coefficients.dtype)

        def write(vector: jax.Array, start: Any, chunk: int) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(vector, sums(start, chunk), start, 0)

        return _per_platform(
            lambda entries: _sweep(count, _chunk(window, entries), zeros, write)
        )

    def update(self, window: SparseRow, coefficients: jax.Array):  # noqa: D102
        if self.layout.axes or self.blocks.count * self.blocks.size > LARGEST_INDEX:
            return self.unpack(self.combine(window, coefficients))
        sums = self._sums(window, coefficients)
        return self.blocks.tree(functools.partial(self._entries, window, sums))

    def _sums(self, window: SparseRow, coefficients: jax.Array) -> Callable[..., Any]:
        """Return `sums(first block, number of blocks)`, those blocks of `combine`."""
        flat = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1), window)
        # One coefficient for every entry of a block, so that a block is flat.
        each = jnp.repeat(coefficients, window.values.shape[2])

        def sums(start: Any, chunk: int) -> jax.Array:
            part = _blocks_at(flat, start, chunk)
            entries = part.values.astype(each.dtype) * each
            return _scatter_add(self.blocks.size, part.offsets, entries)

        return sums

    def _entries(
        self,
        window: SparseRow,
        sums: Callable[..., Any],
        start: int,
        stop: int,
        zero: jax.Array,
    ) -> jax.Array:
        """Return the entries `start` to `stop` of `combine`, laid end to end."""
        size = self.blocks.size
        # The blocks that lie between start and stop as a whole; parts of the block
        # before them and of the one behind may be left.
        first, last = -(-start // size), stop // size
        if first > last:
            return zero + sums(last, 1)[0, start - last * size : stop - last * size]

        def write(out: jax.Array, block: Any, chunk: int) -> jax.Array:
            summed = sums(first + block, chunk).reshape(-1)
            at = (first + block) * size - start
            return lax.dynamic_update_slice_in_dim(out, summed, at, 0)

        out = jnp.full(stop - start, zero)
        if start < first * size:
            out = out.at[: first * size - start].set(
                sums(first - 1, 1)[0, start - first * size :]
            )
        if last * size < stop:
            out = out.at[last * size - start :].set(
                sums(last, 1)[0, : stop - last * size]
            )
        if first == last:
            return out
        return _per_platform(
            lambda entries: _sweep(last - first, _chunk(window, entries), out, write)
        )

    def grams(self, value: jax.Array) -> jax.Array:  # noqa: D102
        return value


def _chunk(window: SparseRow, entries: int) -> int:
    """Return how many blocks of `window` have about `entries` entries."""
    count, rows, kept = window.values.shape
    return min(count, max(1, entries // (rows * kept)))


def _per_platform(fold: Callable[[int], jax.Array]) -> jax.Array:
    """Return `fold(entries a chunk)` for the platform that runs it."""
    return lax.platform_dependent(
        cpu=lambda: fold(_CPU_COMBINE), default=lambda: fold(_ACCELERATOR)
    )


def _sweep(
    count: int,
    chunk: int,
    start: jax.Array,
    step: Callable[[jax.Array, Any, int], jax.Array],
) -> jax.Array:
    """Fold `step(carry, first block, number of blocks)` over `count` blocks."""
    chunk = min(chunk, count)
    whole = count // chunk
    carry = lax.fori_loop(
        0, whole, lambda i, carry: step(carry, i * chunk, chunk), start
    )
    if count % chunk:
        carry = step(carry, whole * chunk, count % chunk)
    return carry


def _slice(tree: chex.ArrayTree, start: Any, chunk: int) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, chunk), tree)


def _blocks_at(window: SparseRow, start: Any, chunk: int) -> SparseRow:
    """Return `chunk` blocks of every array of `window`."""
    # XLA on CPUs slices bfloat16 by way of float32. Without a barrier that depends on
    # the round it would hoist the conversion out of the loop: a float32 window.
    window, _ = lax.optimization_barrier((window, start))
    return _slice(window, start, chunk)


def _gather(vector: jax.Array, offsets: jax.Array) -> jax.Array:
    """Return the entries of `vector`, `(c, size)`, at `offsets`, `(c, m, k)`."""
    index = _positions(vector.shape[1], offsets)
    return vector.reshape(-1).at[index].get(mode="promise_in_bounds")


def _scatter_add(size: int, offsets: jax.Array, entries: jax.Array) -> jax.Array:
    """Return the sums of `entries`, `(c, n)`, by `offsets`; shape `(c, size)`."""
    zeros = jnp.zeros(len(entries) * size, entries.dtype)
    index = _positions(size, offsets).reshape(-1)
    summed = zeros.at[index].add(entries.reshape(-1), mode="promise_in_bounds")
    return summed.reshape(-1, size)


def _positions(size: int, offsets: jax.Array) -> jax.Array:
    """Return `offsets`, `(c, ...)`, counted from the first of the c blocks."""
    # Unsigned, so that indexing does not look for negative numbers.
    offsets = offsets.astype(jnp.uint32)
    if len(offsets) == 1:
        return offsets
    first = jnp.arange(len(offsets), dtype=jnp.uint32) * size
    return offsets + first.reshape(-1, *[1] * (offsets.ndim - 1))

"""Sparse rows: the entries of largest magnitude of each block of the gradient."""

import dataclasses
import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax import _validate
from efcp_jax.compressors import _sparse
from efcp_jax.compressors._blocks import Blocks
from efcp_jax.compressors._entries import SparseRow, Storage, Stored
from efcp_jax.compressors._selection import largest
from efcp_jax.layout import Layout, saturate


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
        dtype = jnp.dtype(self.value_dtype or layout.dtype)
        return SparseSpace(
            blocks=blocks,
            kept=min(blocks.size, max(1, round(self.density * blocks.size))),
            storage=Storage.of(dtype, blocks.size),
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


@dataclasses.dataclass(frozen=True)
class SparseSpace:
    """Rows `(blocks, k)`, windows `(blocks, m, k)`; global top-k is one block."""

    blocks: Blocks
    kept: int
    storage: Storage

    @property
    def layout(self) -> Layout:  # noqa: D102
        return self.blocks.layout

    def pack(self, tree: chex.ArrayTree) -> jax.Array:  # noqa: D102
        return self.blocks.pack(tree)

    def unpack(self, vector: jax.Array) -> chex.ArrayTree:  # noqa: D102
        return self.blocks.unpack(vector)

    def zeros(self) -> tuple[jax.Array, Stored, None]:  # noqa: D102
        count, size = self.blocks.count, self.blocks.size
        vector = jnp.zeros((count, size), self.layout.dtype)
        return vector, self.storage.zeros((count, self.kept)), None

    def specs(self):  # noqa: D102
        spec: Any = self.blocks.spec
        return spec, self.storage.pair(spec), None

    def accumulate(self, tree, vector, accept):  # noqa: D102
        return self.blocks.accumulate(tree, vector, accept)

    def compress(self, vector: jax.Array, basis: None, factor: chex.Numeric = 1.0):  # noqa: D102
        del basis
        # The same entries are largest whatever the factor.
        offsets = largest(vector, self.kept)
        values = jnp.take_along_axis(vector, offsets, axis=1) * factor
        return self.storage.store(values, offsets), None

    def _load(self, stored: Stored) -> tuple[jax.Array, jax.Array]:
        return self.storage.load(stored, self.layout.dtype)

    def expand(self, row: Stored) -> jax.Array:  # noqa: D102
        values, offsets = self._load(row)
        return _sparse.scatter_add(self.blocks.size, offsets, values)

    def residual(self, vector: jax.Array, row: Stored, scale: jax.Array):  # noqa: D102
        values, offsets = self._load(row)
        # k entries a block change, so the vector is updated where it lies. Rounded up,
        # the largest ones may overflow.
        block = jnp.arange(self.blocks.count, dtype=jnp.int32)[:, None]
        taken = saturate(scale * values, vector.dtype)
        return vector.at[block, offsets.astype(jnp.int32)].add(
            -taken, unique_indices=True
        )

    def inner(self, window: Stored, row: Stored) -> jax.Array:  # noqa: D102
        values, offsets = self._load(row)
        shared = SparseRow(self.blocks.share(values), offsets)
        return _sparse.inner(window, shared, self.blocks.size, self._load)

    def combine(self, window: Stored, coefficients: jax.Array):  # noqa: D102
        def place(vector: jax.Array, block: Any, sums: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(vector, sums, block, axis=0)

        count, size = self.blocks.count, self.blocks.size
        zeros = jnp.zeros((count, size), coefficients.dtype)
        blocks = range(count)
        return _sparse.combine(
            window, coefficients, size, self._load, blocks, zeros, place
        )

    def update(self, window: Stored, coefficients: jax.Array):  # noqa: D102
        if not self.blocks.flat:
            return self.unpack(self.combine(window, coefficients))
        return self.blocks.tree(functools.partial(self._entries, window, coefficients))

    def _entries(
        self,
        window: Stored,
        coefficients: jax.Array,
        start: int,
        stop: int,
        zero: jax.Array,
    ) -> jax.Array:
        """Return the entries `start` to `stop` of `combine`, laid end to end."""
        size = self.blocks.size
        combine = functools.partial(
            _sparse.combine, window, coefficients, size, self._load
        )

        def place(out: jax.Array, block: Any, sums: jax.Array) -> jax.Array:
            at = block * size - start
            return lax.dynamic_update_slice_in_dim(out, sums.reshape(-1), at, axis=0)

        def part(block: int, start: int, stop: int) -> jax.Array:
            nothing = jnp.zeros((1, size), self.layout.dtype)
            sums = combine(range(block, block + 1), nothing, lambda _, __, sums: sums)
            return sums[0, start - block * size : stop - block * size]

        # Blocks that lie between start and stop as a whole; parts of the one before
        # them and of the one behind may be left.
        first, last = -(-start // size), stop // size
        if first > last:
            return zero + part(last, start, stop)
        out = jnp.full(stop - start, zero)
        if start < first * size:
            head = part(first - 1, start, first * size)
            out = out.at[: len(head)].set(head)
        if last * size < stop:
            tail = part(last, last * size, stop)
            out = out.at[len(out) - len(tail) :].set(tail)
        return combine(range(first, last), out, place) if first < last else out

    def grams(self, value: jax.Array) -> jax.Array:  # noqa: D102
        return value

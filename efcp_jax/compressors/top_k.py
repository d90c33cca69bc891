"""Sparse rows: the entries of largest magnitude of each block of the gradient."""

import dataclasses

import jax
import numpy as np

from efcp_jax import _validate
from efcp_jax.compressors.base import Space
from efcp_jax.compressors.composite import each_leaf
from efcp_jax.compressors.sparse import SparseSpace
from efcp_jax.devices.layout import Layout
from efcp_jax.passes.entries import DTYPES
from efcp_jax.passes.forms import LARGEST


@dataclasses.dataclass(frozen=True)
class TopK:
    """Configuration of the sparse representation; made by `top_k`.

    Attributes:
        density: Share of the entries kept.
        block_size: Entries a block; None for a single block.
        value_dtype: Dtype of the stored values; None for the working dtype.
        block_diagonal: Whether every leaf has a Gram matrix of its own.
    """

    density: float = 0.01
    block_size: int | None = None
    value_dtype: np.dtype | None = None
    block_diagonal: bool = dataclasses.field(default=False, repr=False)

    lossless = False

    def bind(self, layout: Layout) -> Space:
        """Return the sparse space for trees of `layout`."""
        if self.block_diagonal:
            return each_leaf(dataclasses.replace(self, block_diagonal=False), layout)
        dtype = self.value_dtype or layout.dtype
        return SparseSpace.of(layout, self.block_size, self.density, dtype)


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
            accelerators are fast as well; powers of two suit them best. None makes one
            block of all parameters. Blocks larger than the model are cut down to it.
        value_dtype: Dtype of the stored values. None stores them in the working dtype
            (float32, or float64 for float64 parameters). A floating dtype of 16 bits,
            `jnp.bfloat16`, makes an entry 3 bytes (4 in blocks of more than 256);
            `jnp.int8` and `jnp.float8_e4m3fn` make it 2, in blocks of up to 256 only.
            Error feedback carries the rounding over to the next step.

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
        second with all B places of its block on accelerators, where it is added in one
        fixed order; CPUs scatter it, in 2 to 3 ns an entry. For larger blocks CPUs and
        GPUs gather and scatter m k entries a block, GPUs row after row, so that runs
        repeat bit for bit, and TPUs compare m k^2 and multiply 2 m k B numbers a block:
        prefer small blocks there, and windows whose m k is a multiple of 8, which else
        are copied. Over several devices, one block means one block a device.

        Values of 8 bits are multiples of a power of two that each row has for every
        tile of 128 blocks, 2 bytes. int8 has steps of 1/64 to 1/128 of the largest
        value of the tile, and values below half a step become 0; float8_e4m3fn rounds
        by up to 1/16 of each value, and reaches down to 2^-17 of the largest; bfloat16
        rounds by up to 1/256 of each value. Small models trained alike with all three.
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

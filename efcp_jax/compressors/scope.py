"""The scope of a Gram matrix: all parameters, or each leaf by itself."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np

from efcp_jax.compressors.base import Compressor
from efcp_jax.compressors.by_label import ByLabel
from efcp_jax.compressors.by_leaf import ByLeaf
from efcp_jax.compressors.factors import LowRankSpace
from efcp_jax.compressors.groups import groups_of
from efcp_jax.compressors.identity import Identity
from efcp_jax.compressors.low_rank import LowRank
from efcp_jax.compressors.top_k import TopK
from efcp_jax.devices.layout import Layout


@dataclasses.dataclass(frozen=True)
class LeafIdentity:
    """The dense representation with a Gram matrix for each leaf; made by `scoped`.

    Attributes:
        value_dtype: Dtype of the stored rows; None for the working dtype.
    """

    value_dtype: np.dtype | None = None

    @property
    def lossless(self) -> bool:
        """Whether rows are kept in the working dtype."""
        return self.value_dtype is None

    def bind(self, layout: Layout) -> LowRankSpace:
        """Return the space for trees of `layout`: leaves of one size are a batch."""
        # Factors of this rank make no leaf smaller, so every leaf is kept whole.
        groups = groups_of(layout, sys.maxsize)
        dtype = jnp.dtype(self.value_dtype or layout.dtype)
        return LowRankSpace(layout, groups, dtype, block_diagonal=True)


def scoped(compressor: Compressor, block_diagonal: bool) -> Compressor:
    """Return `compressor` with a Gram matrix for each leaf if `block_diagonal`."""
    if not block_diagonal:
        return compressor
    match compressor:
        case Identity():
            return LeafIdentity(compressor.value_dtype)
        case LowRank():
            return dataclasses.replace(compressor, block_diagonal=True)
        case ByLabel(pairs):
            parts = tuple((label, scoped(each, True)) for label, each in pairs)
            return dataclasses.replace(
                compressor, compressors=parts, block_diagonal=True
            )
        case TopK():
            return ByLeaf(compressor)
    raise ValueError(
        "`block_diagonal` must be False for compressors that are not of this package,"
        f" got True for {compressor!r}. Pass `identity()`, `top_k(...)`,"
        " `low_rank(...)`, `by_label(...)`, or `block_diagonal=False`."
    )

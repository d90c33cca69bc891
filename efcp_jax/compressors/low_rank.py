"""Low rank: a pair of thin factors for every matrix of the gradient."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from efcp_jax import _validate
from efcp_jax.compressors.composite import PartSpace
from efcp_jax.compressors.factors import FactorSpace
from efcp_jax.compressors.identity import Identity
from efcp_jax.compressors.parts import Part, leaf_parts
from efcp_jax.devices.layout import Layout, Leaf


# Into about how many runs all leaves are taken, and the least entries of a run.
_RUNS = 8
_SMALLEST = 65_536


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Configuration of the low-rank representation; made by `low_rank`."""

    rank: int = 4
    value_dtype: np.dtype | None = None
    block_diagonal: bool = dataclasses.field(default=False, repr=False)

    lossless = False

    def bind(self, layout: Layout) -> PartSpace:
        """Return the space of thin matrices, and of all else as it is."""
        thin = [i for i, leaf in enumerate(layout.leaves) if self._helps(leaf)]
        rest = [i for i in range(len(layout.leaves)) if i not in set(thin)]
        dtype = jnp.dtype(self.value_dtype or layout.dtype)
        run = max(_SMALLEST, sum(leaf.size for leaf in layout.leaves) // _RUNS)
        bind = functools.partial(FactorSpace, rank=self.rank, dtype=dtype, run=run)

        def matrix(leaf: Leaf) -> tuple[tuple[int, int], Leaf | None]:
            rows, cols = leaf.matrix_shape
            whole = rows * layout.ways(leaf.row_axes), cols * layout.ways(leaf.col_axes)
            return whole, leaf if leaf.axes else None

        parts = [
            Part.of(name, bind, layout, indices)
            for name, indices in layout.alike(thin, matrix).items()
        ]
        if rest or not thin:
            parts += leaf_parts(Identity(self.value_dtype).bind, layout, rest)
        return PartSpace(layout, tuple(parts), self.block_diagonal)

    def _helps(self, leaf: Leaf) -> bool:
        """Whether factors make a leaf smaller; alike on all devices."""
        cols = leaf.parts * (leaf.whole[-1] if leaf.whole else 1)
        rows = math.prod(leaf.whole[:-1])
        return self.rank * (rows + cols) < rows * cols


def low_rank(
    rank: int = 4,
    *,
    value_dtype: jax.typing.DTypeLike | None = None,
) -> LowRank:
    r"""Keep a factorisation of low rank of every matrix.

    With the basis $V$ of the last step, one subspace iteration gives
    $L = \mathrm{orth}(A V)$, $R = A^T L$ and $C(A) = L R^T = L L^T A$, a projection of
    $A$; then $V \leftarrow R$ with columns of length 1. Leaves of more than two axes
    are matrices of their last axis against all others.

    Args:
        rank: Columns of the factors, at least 1. A leaf that factors of this rank would
            not make smaller, which includes every vector and scalar, is kept whole.
        value_dtype: Floating dtype of the stored factors. None stores them in the
            working dtype (float32, or float64 for float64 parameters); error feedback
            carries the rounding of `jnp.bfloat16` over to the next step.

    Returns:
        An immutable compressor, for the `compressor` argument of the transformations.

    Raises:
        TypeError: An argument is of the wrong type, or traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax
        >>> efcp_jax.low_rank(8)
        LowRank(rank=8, value_dtype=None)

    References:
        Vogels et al., `PowerSGD: Practical Low-Rank Gradient Compression for
        Distributed Optimization <https://arxiv.org/abs/1905.13727>`_, 2019

    Notes:
        Leaves whose matrices have the same shape, and lie on the devices in the same
        way, are one batch: the number of kernels and the time to compile follow the
        number of different shapes. The state has an array for each, named by the shape,
        such as `"256x1024"`, or `"256"` where leaves are kept whole.
        A window takes m r (rows + cols) values a matrix. A step costs two products of
        the matrix with r columns, and about 2 m r^2 (rows + cols) and 2 m r rows cols
        operations for the Gram matrix and the update.
    """
    return LowRank(
        rank=_validate.positive_int("rank", rank),
        value_dtype=_validate.floating_dtype("value_dtype", value_dtype),
    )

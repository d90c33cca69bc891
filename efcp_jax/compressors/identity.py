"""No compression: a row is the gradient itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from efcp_jax import _validate
from efcp_jax.compressors.base import Space, feed
from efcp_jax.compressors.blocks import Blocks
from efcp_jax.compressors.composite import each_leaf
from efcp_jax.compressors.movers import DenseMover
from efcp_jax.devices.layout import Layout
from efcp_jax.numerics import contract, saturate
from efcp_jax.passes import row_scale


@dataclasses.dataclass(frozen=True)
class Identity:
    """Configuration of the dense representation; made by `identity`."""

    value_dtype: np.dtype | None = None
    block_diagonal: bool = dataclasses.field(default=False, repr=False)

    @property
    def lossless(self) -> bool:
        """Whether rows are kept in the working dtype."""
        return self.value_dtype is None

    def bind(self, layout: Layout) -> Space:
        """Return the dense space for trees of `layout`."""
        if self.block_diagonal:
            return each_leaf(Identity(self.value_dtype), layout)
        dtype = self.value_dtype or layout.dtype
        return IdentitySpace(**vars(Blocks.of(layout, None)), dtype=jnp.dtype(dtype))


def identity(*, value_dtype: jax.typing.DTypeLike | None = None) -> Identity:
    """Keep every entry of the gradient.

    $C(a) = a$, rounded to `value_dtype`.

    Args:
        value_dtype: Floating dtype of the stored rows. None stores them in the working
            dtype (float32, or float64 for float64 parameters); `jnp.bfloat16` halves
            the window, and error feedback carries the rounding over to the next step.

    Returns:
        An immutable compressor, for the `compressor` argument of the transformations.

    Raises:
        TypeError: `value_dtype` is not a dtype.
        ValueError: `value_dtype` is not a real floating dtype.

    Examples:
        >>> import efcp_jax
        >>> efcp_jax.identity()
        Identity(value_dtype=None)

    Notes:
        A window of m rows takes 4 m bytes a parameter. A step reads it twice.
    """
    return Identity(_validate.floating_dtype("value_dtype", value_dtype))


@dataclasses.dataclass(frozen=True)
class IdentitySpace(Blocks):
    """Rows `(blocks, 1, size)` in `dtype`, windows `(blocks, m, size)`."""

    dtype: np.dtype

    feed = feed

    def zeros(self) -> tuple[jax.Array, jax.Array, None]:  # noqa: D102
        vector = self.zero()
        return vector, vector[:, None].astype(self.dtype), None

    def specs(self):  # noqa: D102
        return self.spec, self.spec, None

    def compress(self, vector: jax.Array, basis: None, scaled: bool):  # noqa: D102
        scale, inverse = row_scale(vector, scaled)
        return (vector * inverse).astype(self.dtype)[:, None], scale, basis

    def expand(self, row: jax.Array) -> jax.Array:  # noqa: D102
        return row[:, 0].astype(self.layout.dtype)

    def residual(self, vector: jax.Array, row: jax.Array, scale: jax.Array):  # noqa: D102
        return saturate(vector - scale * self.expand(row), vector.dtype)

    def inner(self, window: jax.Array, row: jax.Array) -> jax.Array:  # noqa: D102
        return self._products("bms,bns->bm", window, row)

    def dot(self, window: jax.Array, vector: jax.Array) -> jax.Array:  # noqa: D102
        return self._products("bms,bs->bm", window, vector)

    def _products(self, subscripts: str, *arrays: jax.Array) -> jax.Array:
        products = contract(subscripts, *arrays, dtype=self.layout.dtype)
        shares = self.shares
        return jnp.sum(products if shares is None else shares[:, None] * products, 0)

    def combine(self, window: jax.Array, coefficients: jax.Array):  # noqa: D102
        # A batch of blocks, so that no compiler transposes the window for one matrix.
        each = jnp.broadcast_to(coefficients, window.shape[:2])
        return contract("bms,bm->bs", window.astype(each.dtype), each)

    def update(self, window: jax.Array, coefficients: jax.Array):  # noqa: D102
        return self.unpack(self.combine(window, coefficients))

    def mover(self, new: "IdentitySpace") -> DenseMover:  # noqa: D102
        return DenseMover(self, new)

"""The matrices of leaves, and products of many that are factorised alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efcp_jax.devices.layout import Layout, Leaf
from efcp_jax.numerics import contract, roots, saturate
from efcp_jax.passes import subtract_products


# Up to this rank a product is subtracted in one pass. Above, a matrix unit or a library
# is faster. Products of less than this many entries take no memory to speak of.
_THIN = 8
_SMALL = 65_536


class Matrix(NamedTuple):
    """The matrix of one leaf on one device.

    Attributes:
        shape: Its shape on all devices.
        rows: Rows on this device, padded to divide among the idle mesh axes.
        cols: Columns on this device.
        row_axes: Mesh axes that split the rows.
        col_axes: Mesh axes that split the columns.
        copies: Devices that hold this same part of the leaf.
        leaf: The leaf, if it is divided among devices in a way of its own.
    """

    shape: tuple[int, int]
    rows: int
    cols: int
    row_axes: tuple[str, ...]
    col_axes: tuple[str, ...]
    copies: int
    leaf: Leaf | None

    @classmethod
    def of(cls, leaf: Leaf, layout: Layout) -> "Matrix":
        """Return the matrix of `leaf`."""
        rows, cols = leaf.matrix_shape
        return cls(
            shape=(
                rows * layout.ways(leaf.row_axes),
                cols * layout.ways(leaf.col_axes),
            ),
            rows=-(-rows // layout.ways(layout.split)),
            cols=cols,
            row_axes=(*leaf.row_axes, *layout.split),
            col_axes=leaf.col_axes,
            copies=layout.copies(leaf),
            leaf=leaf if leaf.axes else None,
        )


def subtract(
    values: jax.Array, left: jax.Array, right: jax.Array, factor: jax.Array
) -> jax.Array:
    """Return `values` minus `factor` $L^T R$, within the range of their dtype.

    Args:
        values: Shape `(g, rows, cols)`.
        left: Shape `(g, r, rows)`.
        right: Shape `(g, r, cols)`.
        factor: A scalar, a power of two.

    Returns:
        Array of the shape and dtype of `values`.
    """
    first, second = roots(factor, values.dtype)
    left = left.astype(values.dtype) * first
    right = right.astype(values.dtype)
    # The rounding of one pass depends on what the compiler joins in it. Small products
    # are the same in every program.
    if right.shape[1] > _THIN or values.size <= _SMALL:
        # The power of two comes last: compilers join it with the sum, which rounds
        # nothing.
        rest = values - second * contract("grn,grc->gnc", left, right)
    else:
        rest = subtract_products(values, left, right, second)
    return saturate(rest, values.dtype)


def by_row(products: jax.Array, rank: int) -> jax.Array:
    """Return the sums `(g, m)` of what each row of a window has of `(g, m r, ...)`."""
    each = products.reshape(len(products), products.shape[1] // rank, -1)
    return jnp.sum(each, axis=2)

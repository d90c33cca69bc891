"""How each leaf is factorised, and which part of it a device holds."""

from typing import NamedTuple

from efcp_jax.devices.layout import Layout


class Matrix(NamedTuple):
    """How one leaf is factorised on one device.

    A leaf kept whole is the matrix `(1, n)` with the factors `[[1]]` and itself.

    Attributes:
        rows: Rows on this device, padded to divide among the idle mesh axes.
        cols: Columns on this device.
        rank: Columns of the factors.
        whole: Whether the leaf is kept whole.
        row_axes: Mesh axes that split the rows.
        col_axes: Mesh axes that split the columns.
        col_ways: Number of devices that split the columns.
        copies: Devices that hold this same part of the leaf.
    """

    rows: int
    cols: int
    rank: int
    whole: bool
    row_axes: tuple[str, ...]
    col_axes: tuple[str, ...]
    col_ways: int
    copies: int

    @classmethod
    def of(cls, leaf, layout: Layout, rank: int) -> "Matrix":
        """Decide how `leaf` is factorised, alike on all devices."""
        rows, cols = leaf.matrix_shape
        all_rows = rows * layout.ways(leaf.row_axes)
        all_cols = cols * layout.ways(leaf.col_axes)
        ways = layout.ways(layout.split)
        if rank * (all_rows + all_cols) >= all_rows * all_cols:
            # At least one entry, since checkpoints refuse arrays of size zero.
            share = max(1, -(-leaf.size // ways))
            axes = (*leaf.axes, *layout.split)
            return cls(
                1, share, 1, True, (), axes, layout.ways(axes), layout.copies(leaf)
            )
        row_axes = (*leaf.row_axes, *layout.split)
        share = -(-rows // ways)
        return cls(
            share,
            cols,
            rank,
            False,
            row_axes,
            leaf.col_axes,
            layout.ways(leaf.col_axes),
            layout.copies(leaf),
        )

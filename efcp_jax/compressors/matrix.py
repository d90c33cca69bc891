"""How each leaf is factorised, and which part of it a device holds."""

from typing import NamedTuple

from efcp_jax.devices.layout import Layout, Leaf


class Matrix(NamedTuple):
    """How one leaf is factorised on one device.

    Leaves with equal matrices are one batch, so everything is here that decides what a
    device does with a leaf.

    Attributes:
        shape: Shape of the matrix on all devices; `(n,)` for a leaf kept whole.
        rows: Rows on this device, padded to divide among the idle mesh axes; 1 for a
            leaf kept whole.
        cols: Columns on this device, padded where a leaf is kept whole.
        rank: Columns of the factors; 1 for a leaf kept whole.
        row_axes: Mesh axes that split the rows.
        col_axes: Mesh axes that split the columns.
        col_ways: Number of devices that split the columns.
        copies: Devices that hold this same part of the leaf.
    """

    shape: tuple[int, ...]
    rows: int
    cols: int
    rank: int
    row_axes: tuple[str, ...]
    col_axes: tuple[str, ...]
    col_ways: int
    copies: int

    @property
    def whole(self) -> bool:
        """Whether the leaf is kept whole."""
        return len(self.shape) == 1

    @property
    def name(self) -> str:
        """The shape as a word, such as `256x1024`, or `256` for a leaf kept whole."""
        return "x".join(map(str, self.shape))

    @classmethod
    def of(cls, leaf: Leaf, layout: Layout, rank: int) -> "Matrix":
        """Decide how `leaf` is factorised, alike on all devices."""
        rows, cols = leaf.matrix_shape
        all_rows = rows * layout.ways(leaf.row_axes)
        all_cols = cols * layout.ways(leaf.col_axes)
        ways, copies = layout.ways(layout.split), layout.copies(leaf)
        if rank * (all_rows + all_cols) >= all_rows * all_cols:
            axes = (*leaf.axes, *layout.split)
            # At least one entry, since checkpoints refuse arrays of size zero.
            share = max(1, -(-leaf.size // ways))
            # Entries of a leaf that is divided along its first axis are in order.
            ordered = not any(leaf.partition[1:]) and leaf.parts == 1
            return cls(
                shape=(all_rows * all_cols,),
                rows=1,
                cols=share + int(layout.chosen and not ordered),
                rank=1,
                row_axes=(),
                col_axes=axes,
                col_ways=layout.ways(axes),
                copies=copies,
            )
        return cls(
            shape=(all_rows, all_cols),
            rows=-(-rows // ways),
            cols=cols,
            rank=rank,
            row_axes=(*leaf.row_axes, *layout.split),
            col_axes=leaf.col_axes,
            col_ways=layout.ways(leaf.col_axes),
            copies=copies,
        )

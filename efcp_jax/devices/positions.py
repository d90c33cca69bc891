"""Which entry of the parameters each entry of a state's arrays stands for.

The global arrays of a state depend on how many devices made it: blocks are padded to
divide among devices, and each device packs its own shards. Here the layout of a state
is written out as NumPy arrays of positions, on the host, so that a state can be carried
from one layout to another. Position -1 is padding.
"""

from collections.abc import Iterator
import itertools
from typing import Any

import numpy as np

from efcp_jax.devices.layout import Layout, Leaf


def of_blocks(blocks: Any) -> np.ndarray:
    """Return the positions of the entries of all blocks of all devices.

    Args:
        blocks: The `Blocks` of a device.

    Returns:
        Places in the leaves laid end to end, int64, shape `(global blocks, size)`.
    """
    layout: Layout = blocks.layout
    sizes = [leaf.whole_size for leaf in layout.leaves]
    starts = np.cumsum([0, *sizes])
    parts = []
    for at in _devices(layout, layout.axes):
        pieces = []
        for indices, count in blocks.groups:
            entries = [_entries(layout.leaves[i], layout, at) for i in indices]
            held = [
                np.where(places < 0, -1, starts[i] + places)
                for i, places in zip(indices, entries, strict=True)
            ]
            used = sum(piece.size for piece in held)
            padding = np.full(count * blocks.size - used, -1, np.int64)
            pieces += [*(piece.reshape(-1) for piece in held), padding]
        rows = np.concatenate(pieces).reshape(-1, blocks.size)
        parts.append(_own(rows, layout, at))
    return np.concatenate(parts)


def of_matrix(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the rows and of the columns of a factorised leaf.

    Args:
        layout: That of leaves of equal matrices.

    Returns:
        Row and column numbers in a leaf's whole matrix, two arrays of int64.
    """
    leaf, rows = layout.leaves[0], []
    for at in _devices(layout, (*leaf.row_axes, *layout.split)):
        numbers = _part(leaf, layout, at, slice(0, -1)).reshape(-1)
        missing = -numbers.size % layout.ways(layout.split)
        rows.append(_own(np.pad(numbers, (0, missing), constant_values=-1), layout, at))
    columns = [
        _real(_part(leaf, layout, at, slice(-1, None)), leaf)
        for at in _devices(layout, leaf.col_axes)
    ]
    return np.concatenate(rows), np.concatenate(columns)


def inverse(places: np.ndarray) -> np.ndarray:
    """Return where each position is in `places`, -1 where it is not."""
    flat = places.reshape(-1)
    inverse = np.full(flat.max(initial=-1) + 2, -1, np.int64)
    held = flat >= 0
    inverse[flat[held]] = np.flatnonzero(held)
    return inverse


def take(array: Any, index: np.ndarray, axis: int) -> np.ndarray:
    """Take `index` along `axis`, with zeros where it is negative."""
    array = np.asarray(array)
    taken = array.take(np.maximum(index, 0), axis=axis)
    shape = [1] * taken.ndim
    shape[axis] = index.size
    return np.where(index.reshape(shape) >= 0, taken, np.zeros((), array.dtype))


def _devices(layout: Layout, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Yield the coordinates of the devices along `axes`, in the order of their parts.

    Coordinates along other axes are 0.
    """
    sizes = dict(layout.mesh)
    for numbers in itertools.product(*(range(sizes[axis]) for axis in axes)):
        yield dict.fromkeys(sizes, 0) | dict(zip(axes, numbers, strict=True))


def _number(layout: Layout, axes: tuple[str, ...], at: dict[str, int]) -> int:
    number = 0
    for axis in axes:
        number = number * layout.ways((axis,)) + at[axis]
    return number


def _own(array: np.ndarray, layout: Layout, at: dict[str, int]) -> np.ndarray:
    """Return the part of `array` that a device owns among the idle axes."""
    part = array.shape[0] // layout.ways(layout.split)
    start = part * _number(layout, layout.split, at)
    return array[start : start + part]


def _part(leaf: Leaf, layout: Layout, at: dict[str, int], which: slice) -> np.ndarray:
    """Return the numbers of the entries of a shard, over the axes `which`."""
    numbers, held = np.zeros((), np.int64), np.ones((), bool)
    for size, count, names in zip(
        leaf.shape[which], _whole(leaf)[which], leaf.partition[which], strict=True
    ):
        places = size * _number(layout, names, at) + np.arange(size)
        numbers = numbers[..., None] * count + places
        held = held[..., None] & (places < count)
    return np.where(held, numbers, -1)


def _whole(leaf: Leaf) -> tuple[int, ...]:
    """Return the shape of the whole leaf, of as many axes as that of its shards."""
    return leaf.whole if leaf.whole or not leaf.shape else (1,)


def _real(columns: np.ndarray, leaf: Leaf) -> np.ndarray:
    """Return the columns of the real matrix that stand for `columns` of the leaf."""
    columns = columns.reshape(-1)
    if leaf.parts == 1:
        return columns
    count = _whole(leaf)[-1] if leaf.shape else 1
    return np.concatenate([columns, np.where(columns < 0, -1, count + columns)])


def _entries(leaf: Leaf, layout: Layout, at: dict[str, int]) -> np.ndarray:
    """Return the positions of a shard's real matrix in the whole real matrix."""
    rows = _part(leaf, layout, at, slice(0, -1)).reshape(-1, 1)
    columns = _real(_part(leaf, layout, at, slice(-1, None)), leaf)
    width = leaf.parts * (_whole(leaf)[-1] if leaf.shape else 1)
    return np.where((rows < 0) | (columns < 0), -1, rows * width + columns)

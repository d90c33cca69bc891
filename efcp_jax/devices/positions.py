"""States carried from one layout to another.

The global arrays of a state depend on the devices that made it: blocks are padded to
divide among them, and each packs its own shards. Here a layout is written out as NumPy
arrays of positions, on the host: numbers of entries of the parameters, -1 for padding.
"""

from collections.abc import Iterator
import functools
from typing import Any

import jax
import numpy as np

from efcp_jax import quantized
from efcp_jax.devices.layout import Layout, Leaf
from efcp_jax.devices.spread import Description


def of_blocks(blocks: Any) -> np.ndarray:
    """Return the positions of the entries of all `Blocks` of all devices.

    In the leaves laid end to end; in the shape of the vector of all devices.
    """
    layout: Layout = blocks.layout
    each, start = [], 0
    for leaf in layout.leaves:
        whole, *held = _axes(leaf)
        numbers = start + np.arange(leaf.whole_size).reshape(whole)
        each.append(functools.partial(_part, numbers, *held, layout))
        start += leaf.whole_size
    parts = []
    for at in _devices(layout, layout.axes):
        pieces = []
        for indices, count in blocks.groups:
            pieces += [each[i](at).reshape(-1) for i in indices]
            used = sum(layout.leaves[i].size for i in indices)
            pieces.append(np.full(count * blocks.unit - used, -1))
        rows = np.concatenate(pieces).reshape(-1, *blocks.shape[1:])
        parts.append(_own(rows, layout, at))
    return np.concatenate(parts)


def of_matrix(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the rows and of the columns of equal matrices."""
    leaf, rows = layout.leaves[0], []
    whole, held, names = _axes(leaf)

    def numbers(which: slice, at: dict[str, int]) -> np.ndarray:
        shape = whole[which]
        every = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        return _part(every, held[which], names[which], layout, at).reshape(-1)

    for at in _devices(layout, (*leaf.row_axes, *layout.split)):
        found = numbers(slice(-2), at)
        missing = -found.size % layout.ways(layout.split)
        rows.append(_own(np.pad(found, (0, missing), constant_values=-1), layout, at))
    columns = [numbers(slice(-2, None), at) for at in _devices(layout, leaf.col_axes)]
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


def _axes(leaf: Leaf) -> tuple[Any, Any, Any]:
    """Return a leaf's shape, a shard's, and what divides it, with an axis of parts.

    That is of real and imaginary parts, in front of the columns.
    """
    parts, with_parts = leaf.parts, lambda each, x: (*each[:-1], x, each[-1])
    whole, held = (with_parts(x or (1,), parts) for x in (leaf.whole, leaf.shape))
    return whole, held, with_parts(leaf.partition or ((),), ())


def _devices(layout: Layout, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Yield the coordinates of devices along `axes` in order, 0 along all others."""
    sizes = dict(layout.mesh)
    for numbers in np.ndindex(*(sizes[axis] for axis in axes)):
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


def _part(
    array: np.ndarray, shape: Any, partition: Any, layout: Layout, at: dict[str, int]
) -> np.ndarray:
    """Return a device's part, of `shape`, of an array that `partition` divides."""
    sides = list(zip(shape, partition, strict=True))
    starts = [size * _number(layout, names, at) for size, names in sides]
    held = array[*(slice(a, a + n) for a, n in zip(starts, shape, strict=True))]
    part = np.full(shape, -1)
    part[*map(slice, held.shape)] = held
    return part


def convert(state: Any, source: Description, target: Description) -> Any:
    """Return `state`, made for the layout of `source`, in that of `target`."""
    _check(state, source, target)
    mover, like = source.space.mover(target.space), target.arrays

    def error(held: Any) -> Any:
        vector = mover.vector(quantized.load(jax.tree.map(np.asarray, held)))
        return quantized.store_on_host(vector, like.error)

    ways = {
        "error": error,
        "basis": lambda held: mover.basis(held),  # not every mover knows one
        "metric": lambda held: held._replace(
            moments=_moments(
                held.moments, source.space.layout, target.space.layout, like.metric
            )
        ),
        "gram": mover.grams,
        "factor": mover.grams,
        "window": lambda held: held._replace(rows=mover.rows(held.rows)),
    }
    held = {name: getattr(state, name, None) for name in ways}
    moved = {n: ways[n](each) for n, each in held.items() if each is not None}
    return state._replace(**moved)


def _moments(held: Any, source: Layout, target: Layout, like: Any) -> dict[str, Any]:
    """Return the moments of every kind; what is alike here may not be there."""
    leaves: dict[int, Any] = {}
    for name, indices in source.kinds.items():
        arrays = jax.tree.map(np.asarray, held[name])
        # One leaf alone has an array of its own shape, unless there are factors.
        bare = len(indices) == 1 and isinstance(arrays, np.ndarray)
        for place, index in enumerate(indices):
            one = lambda x, place=place: x[place]
            leaves[index] = arrays if bare else jax.tree.map(one, arrays)

    def kind(name: str, indices: tuple[int, ...]) -> Any:
        if len(indices) == 1 and not isinstance(like.moments[name], tuple):
            return _fitted(leaves[indices[0]], like.moments[name].shape)
        stack = lambda struct, *each: np.stack(
            [_fitted(x, struct.shape[1:]) for x in each]
        )
        return jax.tree.map(stack, like.moments[name], *(leaves[i] for i in indices))

    return {name: kind(name, indices) for name, indices in target.kinds.items()}


def _fitted(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return `array` in `shape`, cut or padded; scalars may be padded."""
    array = np.atleast_1d(array)
    fitted = np.zeros(shape or (1,), array.dtype)
    both = [slice(min(pair)) for pair in zip(array.shape, fitted.shape, strict=True)]
    fitted[*both] = array[*both]
    return fitted.reshape(shape)


def _check(state: Any, source: Description, target: Description) -> None:
    """Raise unless the two states differ in their layout only."""
    pairs = zip(jax.tree.leaves(source.arrays), jax.tree.leaves(state), strict=True)
    for made, received in pairs:
        if made.shape != np.shape(received):
            raise ValueError(
                f"`state` was not made for `source`: it has an array of shape"
                f" {np.shape(received)} where `source` makes {made.shape}."
            )
    for what, of in {
        "states of different structure": _structure,
        "parameters of different shapes": lambda x: [
            leaf.whole for leaf in x.space.layout.leaves
        ],
    }.items():
        old, new = of(source), of(target)
        if old != new:
            raise ValueError(f"`source` and `target` have {what}: {old} and {new}.")


def _structure(description: Description) -> Any:
    """Return the kinds of the fields, whichever way rows and groups are stored."""
    fields = description.arrays._asdict()
    kinds = {name: type(value).__name__ for name, value in fields.items()}
    return type(description.space).__name__, kinds

"""Moving the arrays of a state from one layout to another, on the host."""

from typing import Any

import jax
import numpy as np

from efcp_jax.devices.description import Description


def convert(state: Any, source: Description, target: Description) -> Any:
    """Return `state`, made for the layout of `source`, in that of `target`.

    Raises:
        ValueError: They differ in more than the layout, or kept entries do not fit.
    """
    _check(state, source, target)
    mover = source.space.mover(target.space)
    fields = {
        "error": None if state.error is None else mover.vector(state.error),
        "basis": None if state.basis is None else mover.basis(state.basis),
    }
    if hasattr(state, "window"):
        rows = mover.rows(state.window.rows)
        fields["window"] = state.window._replace(rows=rows)
    return state._replace(**fields)


def _check(state: Any, source: Description, target: Description) -> None:
    """Raise unless the two states differ in their layout only."""
    structures = [_structure(each) for each in (source, target)]
    if structures[0] != structures[1]:
        raise ValueError(
            "`source` and `target` make states of different structure:"
            f" {structures[0]} and {structures[1]}."
        )
    pairs = zip(jax.tree.leaves(source.arrays), jax.tree.leaves(state), strict=True)
    for made, received in pairs:
        if made.shape != np.shape(received):
            raise ValueError(
                f"`state` was not made for `source`: it has an array of shape"
                f" {np.shape(received)} where `source` makes {made.shape}."
            )
    whole = lambda layout: [
        tuple(
            n * layout.ways(axes)
            for n, axes in zip(leaf.shape, leaf.partition, strict=True)
        )
        for leaf in layout.leaves
    ]
    shapes = [whole(each.space.layout) for each in (source, target)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`source` and `target` have parameters of different shapes: {shapes[0]}"
            f" and {shapes[1]}."
        )


def _structure(description: Description) -> Any:
    """Return the structure of the state, whichever way rows are stored."""
    arrays = description.arrays
    if hasattr(arrays, "window"):
        arrays = arrays._replace(window=arrays.window._replace(rows=None))
    return type(description.space), jax.tree.structure(arrays)

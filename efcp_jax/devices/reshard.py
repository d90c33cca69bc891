"""Moving the arrays of a state from one layout to another, on the host."""

from typing import Any

import jax
import numpy as np

from efcp_jax import quantized
from efcp_jax.devices.description import Description


def convert(state: Any, source: Description, target: Description) -> Any:
    """Return `state`, made for the layout of `source`, in that of `target`.

    Raises:
        ValueError: They differ in more than the layout, or kept entries do not fit.
    """
    _check(state, source, target)
    new = moved(state, source.space.mover(target.space), target.arrays)
    if new.metric is None:
        return new
    fit = lambda array, like: _fitted(np.asarray(array), like.shape)
    return new._replace(metric=jax.tree.map(fit, new.metric, target.arrays.metric))


def moved(state: Any, mover: Any, like: Any) -> Any:
    """Return `state` with every field that knows the layout moved by `mover`.

    Args:
        state: The state, arrays of NumPy.
        mover: What moves each kind of field.
        like: The state that is to be made, of which only shapes are read.
    """

    def error(error: Any) -> Any:
        vector = mover.vector(quantized.load(jax.tree.map(np.asarray, error)))
        return quantized.store_on_host(vector, like.error)

    ways = {"error": error, "basis": lambda basis: mover.basis(basis)}
    fields = {
        name: None if getattr(state, name) is None else move(getattr(state, name))
        for name, move in ways.items()
    }
    if hasattr(state, "window"):
        rows = mover.rows(state.window.rows)
        fields["window"] = state.window._replace(rows=rows)
        fields["gram"] = mover.grams(state.gram)
        fields["factor"] = mover.grams(state.factor)
    return state._replace(**fields)


def _fitted(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return `array` in a shape that holds the same numbers; the rest is padding."""
    array = array.reshape(array.shape or (shape and (1,) * len(shape)))
    if array.ndim != len(shape):  # a scalar that was padded
        return array.reshape(-1)[0]
    fitted = np.zeros(shape, array.dtype)
    both = tuple(slice(min(pair)) for pair in zip(array.shape, shape, strict=True))
    fitted[both] = array[both]
    return fitted


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
    shapes = [
        [leaf.whole for leaf in each.space.layout.leaves] for each in (source, target)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`source` and `target` have parameters of different shapes: {shapes[0]}"
            f" and {shapes[1]}."
        )


def _structure(description: Description) -> Any:
    """Return the kinds of the fields, whichever way rows and groups are stored."""
    arrays = description.arrays
    kinds = {name: type(getattr(arrays, name)).__name__ for name in arrays._fields}
    return type(description.space).__name__, kinds

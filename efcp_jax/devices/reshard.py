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
    mover, like = source.space.mover(target.space), target.arrays

    def error(held: Any) -> Any:
        vector = mover.vector(quantized.load(jax.tree.map(np.asarray, held)))
        return quantized.store_on_host(vector, like.error)

    def metric(held: Any) -> Any:
        fit = lambda array, like: _fitted(np.asarray(array), like.shape)
        return jax.tree.map(fit, held, like.metric)

    # Not every mover knows a basis.
    ways = {"error": error, "basis": lambda x: mover.basis(x), "metric": metric}
    ways |= {"gram": mover.grams, "factor": mover.grams}
    held = {name: getattr(state, name, None) for name in ways}
    fields = {n: ways[n](each) for n, each in held.items() if each is not None}
    if hasattr(state, "window"):
        rows = mover.rows(state.window.rows)
        fields["window"] = state.window._replace(rows=rows)
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
    pairs = zip(jax.tree.leaves(source.arrays), jax.tree.leaves(state), strict=True)
    for made, received in pairs:
        if made.shape != np.shape(received):
            raise ValueError(
                f"`state` was not made for `source`: it has an array of shape"
                f" {np.shape(received)} where `source` makes {made.shape}."
            )
    for what, of in (
        ("states of different structure", _structure),
        ("parameters of different shapes", _shapes),
    ):
        if of(source) != of(target):
            raise ValueError(
                f"`source` and `target` have {what}: {of(source)} and {of(target)}."
            )


def _shapes(description: Description) -> Any:
    return [leaf.whole for leaf in description.space.layout.leaves]


def _structure(description: Description) -> Any:
    """Return the kinds of the fields, whichever way rows and groups are stored."""
    arrays = description.arrays
    kinds = {name: type(getattr(arrays, name)).__name__ for name in arrays._fields}
    return type(description.space).__name__, kinds

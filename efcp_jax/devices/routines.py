"""Computations side by side that share their collectives and their small batches."""

from collections.abc import Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


# A computation that yields what it wants reduced over mesh axes (by `lax.psum` or
# `lax.pmax`), receives the result, and returns its own. With None for the axes it asks
# for a function of a batch of small arrays.
Routine = Generator[tuple[Any, jax.Array, tuple[str, ...] | None], jax.Array, Any]


def together(routines: Iterable[Routine]) -> list[Any]:
    """Run `routines` side by side and return their results.

    What they yield in the same round, for the same axes, travels in one collective, so
    the number of collectives does not grow with the number of routines. Batches for the
    same function are one batch.
    """
    routines = list(routines)
    results: list[Any] = [None] * len(routines)
    answers: dict[int, Any] = dict.fromkeys(range(len(routines)))
    while answers:
        requests: dict[Any, dict[int, jax.Array]] = {}
        for index, answer in answers.items():
            try:
                reduce, value, axes = routines[index].send(answer)
            except StopIteration as stop:
                results[index] = stop.value
            else:
                alike = value.shape[1:] if axes is None else None
                key = (reduce, axes, value.dtype, alike)
                requests.setdefault(key, {})[index] = value
        answers = {}
        for (reduce, axes, *_), values in requests.items():
            if axes is None:
                answers |= _batched(reduce, values)
            else:
                answers |= joined(reduce, axes, values) if axes else values
    return results


def joined(
    reduce: Any, axes: tuple[str, ...], values: dict[int, jax.Array]
) -> dict[int, jax.Array]:
    """Return `reduce(value, axes)` of each of `values`, in one collective."""
    if len(values) == 1:
        return {index: reduce(value, axes) for index, value in values.items()}
    flat = jnp.concatenate([value.reshape(-1) for value in values.values()])
    ends = np.cumsum([value.size for value in values.values()])
    pieces = jnp.split(reduce(flat, axes), ends[:-1])
    return {
        index: piece.reshape(value.shape)
        for (index, value), piece in zip(values.items(), pieces, strict=True)
    }


def _batched(function: Any, values: dict[int, jax.Array]) -> dict[int, jax.Array]:
    """Return `function` of each of `values`, in one batch along the first axis."""
    ends = np.cumsum([len(value) for value in values.values()])
    results = function(jnp.concatenate(list(values.values())))
    return dict(zip(values, jnp.split(results, ends[:-1]), strict=True))

"""Inside of `jax.shard_map`: collectives that are shared, and values that differ.

Which values differ between devices their types tell. Branches and loops must be given
one type, so there what is the same on all devices, such as a state of zeros, is taken
to differ as the gradient does.
"""

from collections.abc import Generator, Iterable
from typing import Any

import jax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np


# A computation that yields what it wants reduced over mesh axes (by `lax.psum` or
# `lax.pmax`), receives the result, and returns its own. With None for the axes it asks
# for a function of a batch of small arrays.
Routine = Generator[tuple[Any, jax.Array, tuple[str, ...] | None], jax.Array, Any]


def together(routines: Iterable[Routine]) -> list[Any]:
    """Run `routines` side by side and return their results.

    What they yield in the same round, for the same axes, travels in one collective,
    however many there are. Batches for the same function are one batch.
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
                answers |= joined(reduce, axes, values)
    return results


def joined(reduce: Any, axes: tuple[str, ...], tree: Any) -> Any:
    """Return `reduce(x, axes)` of all x of `tree`, of one dtype, in one collective."""
    if not axes:
        return tree
    if len(jax.tree.leaves(tree)) < 2:
        return jax.tree.map(lambda x: reduce(x, axes), tree)
    flat, restore = ravel_pytree(tree)
    return restore(reduce(flat, axes))


def _batched(function: Any, values: dict[int, jax.Array]) -> dict[int, jax.Array]:
    """Return `function` of each of `values`, in one batch along the first axis."""
    ends = np.cumsum([len(value) for value in values.values()])
    results = function(jnp.concatenate(list(values.values())))
    return dict(zip(values, jnp.split(results, ends[:-1]), strict=True))


def varying_axes(tree: Any) -> frozenset[Any]:
    """Return the mesh axes over which an array of `tree` differs."""
    kinds = (_kind(leaf) for leaf in jax.tree.leaves(tree))
    return frozenset().union(*(kind.varying for kind in kinds if kind is not None))


def vary_over(axes: frozenset[Any], tree: Any) -> Any:
    """Return `tree`, all arrays of which differ over `axes`."""

    def one(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(leaf), key=str))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree) if axes else tree


def vary_like(reference: Any, tree: Any) -> Any:
    """Return `tree`, which differs wherever an array of `reference` does."""
    return vary_over(varying_axes(reference), tree)


def varying_struct(shape: Any, dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """Return the type of an array that differs over the axes that `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=_kind(like))


def _kind(leaf: Any) -> Any:
    if not isinstance(leaf, Tracer):
        return None
    return getattr(jax.typeof(leaf), "manual_axis_type", None)

"""What of a traced program indexes further than the 32 bits of an index reach.

An independent proof that no shape is too large: every operation that addresses entries
of an array by numbers, or counts them, is looked at, in all branches and loops.
"""

from collections.abc import Iterator
import math
from typing import Any

import jax
import jax.numpy as jnp


REACH = 2**31 - 1


def too_far(jaxpr: Any, reach: int = REACH) -> Iterator[str]:
    """Yield what indexes or counts more than `reach` entries along one axis."""
    for eqn in jaxpr.eqns:
        lengths = [n for n in _indexed(eqn) if n > reach]
        if lengths:
            yield f"{eqn.primitive.name} along {lengths}: {eqn.source_info.traceback}"
        for inner in _inner(eqn):
            yield from too_far(inner, reach)


def _indexed(eqn: Any) -> list[int]:
    """Return the lengths of the axes that the operation tells entries apart along."""
    name, params, first = eqn.primitive.name, eqn.params, None
    if eqn.invars:
        first = eqn.invars[0].aval
    partly = lambda sizes: [
        n for n, size in zip(first.shape, sizes, strict=True) if size < n
    ]
    if name in ("dynamic_slice", "gather"):
        return partly(params["slice_sizes"])
    if name == "dynamic_update_slice":
        return partly(eqn.invars[1].aval.shape)
    if name.startswith("scatter"):
        numbers = params["dimension_numbers"]
        return [first.shape[i] for i in numbers.scatter_dims_to_operand_dims]
    if name == "iota" and jnp.issubdtype(params["dtype"], jnp.integer):
        return [params["shape"][params["dimension"]]]
    if name in ("argmax", "argmin"):
        return [first.shape[i] for i in params["axes"]]
    counts = jnp.issubdtype(getattr(first, "dtype", jnp.float32), jnp.integer)
    if name == "reduce_sum" and counts:
        return [math.prod(first.shape[i] for i in params["axes"])]
    if name == "cumsum" and counts:
        return [first.shape[params["axis"]]]
    return []


def _inner(eqn: Any) -> Iterator[Any]:
    """Yield the programs that an operation holds: branches, bodies, kernels."""
    held = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    for value in jax.tree.leaves(eqn.params, is_leaf=held):
        if held(value):
            yield getattr(value, "jaxpr", value)

"""Values that differ between devices inside of `jax.shard_map`, which their types tell.

Branches and loops must be given one type, so there what is the same on all devices,
such as a state of zeros, is taken to differ as the gradient does.
"""

from typing import Any

import jax
from jax.core import Tracer


def axes_of(tree: Any) -> frozenset[Any]:
    """Return the mesh axes over which an array of `tree` differs."""
    kinds = (_kind(leaf) for leaf in jax.tree.leaves(tree))
    return frozenset().union(*(kind.varying for kind in kinds if kind is not None))


def over(axes: frozenset[Any], tree: Any) -> Any:
    """Return `tree`, all arrays of which differ over `axes`."""

    def one(leaf: Any) -> Any:
        missing = tuple(sorted(axes - axes_of(leaf), key=str))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree) if axes else tree


def like(reference: Any, tree: Any) -> Any:
    """Return `tree`, which differs wherever an array of `reference` does."""
    return over(axes_of(reference), tree)


def struct(shape: Any, dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """Return the type of an array that differs over the axes that `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=_kind(like))


def _kind(leaf: Any) -> Any:
    if not isinstance(leaf, Tracer):
        return None
    return getattr(jax.typeof(leaf), "manual_axis_type", None)

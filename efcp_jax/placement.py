"""Where the leaves of a tree live, and running a step on every device at once.

Under Explicit mesh axes the shardings are part of the arrays' types. Under Auto axes a
traced function cannot see them, so they are given, in JAX's own types.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efcp_jax.layout import Layout, Leaf


class Placement(NamedTuple):
    """The mesh a tree is spread over, and the partition of each leaf.

    Attributes:
        mesh: The mesh, concrete or abstract.
        specs: One `PartitionSpec` a leaf, in order.
    """

    mesh: Any
    specs: tuple[PartitionSpec, ...]


def find(tree: chex.ArrayTree, sharding: Any = None) -> Placement | None:
    """Return how `tree` is placed, or None for a step on one device.

    Args:
        tree: Parameters, or anything with their structure and types.
        sharding: A `NamedSharding` or, under an ambient mesh, a `PartitionSpec` for
            every leaf, as a tree prefix; None to read the types of the leaves.

    Returns:
        The placement; None where `sharding` is None and no leaf lives on a mesh with
        Explicit axes.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return None
    if sharding is None:
        types = [_explicit_sharding(leaf) for leaf in leaves]
        meshes = [each.mesh for each in types if each is not None]
        if not meshes:
            return None
        specs = (PartitionSpec() if each is None else each.spec for each in types)
        return Placement(meshes[0], tuple(specs))
    is_leaf = lambda node: isinstance(node, NamedSharding | PartitionSpec)
    full = jax.tree.map(
        lambda each, subtree: jax.tree.map(lambda _: each, subtree),
        sharding,
        tree,
        is_leaf=is_leaf,
    )
    given = jax.tree.leaves(full, is_leaf=is_leaf)
    meshes = [each.mesh for each in given if isinstance(each, NamedSharding)]
    specs = (each.spec if isinstance(each, NamedSharding) else each for each in given)
    return Placement(
        meshes[0] if meshes else jax.sharding.get_abstract_mesh(), tuple(specs)
    )


def _explicit_sharding(leaf: Any) -> NamedSharding | None:
    is_array = isinstance(leaf, jax.Array)
    sharding = jax.typeof(leaf).sharding if is_array else getattr(leaf, "sharding", 0)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    kinds = set(sharding.mesh.axis_types)
    return sharding if kinds == {AxisType.Explicit} else None


def layout(
    tree: chex.ArrayTree, dtype: jax.typing.DTypeLike, placement: Placement | None
) -> Layout:
    """Return the layout of `tree` on each device of `placement`."""
    leaves, treedef = jax.tree.flatten(tree)
    avals = [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    if placement is None:
        return Layout(treedef, tuple(Leaf(*aval) for aval in avals), jnp.dtype(dtype))
    sizes = dict(placement.mesh.shape)
    local = tuple(
        _local(shape, leaf_dtype, spec, sizes)
        for (shape, leaf_dtype), spec in zip(avals, placement.specs, strict=True)
    )
    used = {axis for leaf in local for axis in leaf.axes}
    split = tuple(axis for axis in sizes if axis not in used)
    return Layout(treedef, local, jnp.dtype(dtype), tuple(sizes.items()), split)


def _local(shape, dtype, spec: PartitionSpec, sizes: dict[str, int]) -> Leaf:
    names = [_axes(entry) for entry in spec] + [()] * (len(shape) - len(spec))
    ways = [math.prod(sizes[name] for name in axes) for axes in names]
    return Leaf(
        shape=tuple(n // w for n, w in zip(shape, ways, strict=True)),
        dtype=dtype,
        row_axes=tuple(name for axes in names[:-1] for name in axes),
        col_axes=names[-1] if names else (),
    )


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def run(
    function: Callable[..., Any],
    placement: Placement | None,
    in_specs: tuple[Any, ...],
    out_specs: Any,
    *args: Any,
) -> Any:
    """Call `function` on each device's parts of `args`; plainly on one device."""
    if placement is None:
        return function(*args)
    spread = jax.shard_map(
        function,
        mesh=placement.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        # Blocks that several devices hold are computed alike on all of them, which
        # the check of varying axes cannot see.
        check_vma=False,
    )
    return jax.jit(spread)(*args)


def move(tree: chex.ArrayTree, specs: tuple[PartitionSpec, ...]) -> chex.ArrayTree:
    """Reshard the leaves of `tree` whose types, under Explicit axes, differ."""
    leaves, treedef = jax.tree.flatten(tree)
    moved = []
    for leaf, spec in zip(leaves, specs, strict=True):
        sharding = _explicit_sharding(leaf)
        if sharding is not None and sharding.spec != spec:
            leaf = jax.sharding.reshard(leaf, spec)
        moved.append(leaf)
    return treedef.unflatten(moved)


def move_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Reshard the leaves of `tree` to the types of `like`, under Explicit axes."""
    shardings = [_explicit_sharding(leaf) for leaf in jax.tree.leaves(like)]
    specs = tuple(PartitionSpec() if each is None else each.spec for each in shardings)
    return move(tree, specs) if any(s is not None for s in shardings) else tree

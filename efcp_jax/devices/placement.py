"""Where the leaves of a tree live.

Under Explicit mesh axes the shardings are part of the arrays' types. Under Auto axes a
traced function cannot see them: they are given, in JAX's own types, or the step chooses
a division of its own.
"""

from typing import Any, NamedTuple

import chex
import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efcp_jax.devices import auto
from efcp_jax.devices.layout import Layout, Leaf
from efcp_jax.devices.trees import broadcast, is_variable, leaf_name, names_of


class Placement(NamedTuple):
    """The mesh a tree is spread over, and the partition of each leaf.

    Attributes:
        mesh: The mesh, concrete or abstract.
        specs: One `PartitionSpec` a leaf, in order.
        shapes: Shapes that the leaves are padded to, where their placement is not known
            and the step has chosen a division of its own; else None.
    """

    mesh: Any
    specs: tuple[PartitionSpec, ...]
    shapes: tuple[tuple[int, ...], ...] | None = None


def find(
    tree: chex.ArrayTree, sharding: Any = None, *others: chex.ArrayTree
) -> Placement | None:
    """Return how `tree` is placed, or None for a step on one device.

    Args:
        tree: Parameters, or anything with their structure and types.
        sharding: A `NamedSharding` or, under an ambient mesh, a `PartitionSpec` for
            every leaf, as a tree prefix; None to read the types of the leaves.
        *others: What may name the mesh where `tree` does not.

    Returns:
        The placement; under Auto axes and with `sharding` None a division that the step
        chooses. None where no leaf lives on a mesh.

    Raises:
        TypeError: `sharding` holds something else.
        ValueError: A leaf has no sharding, there is no mesh, or there are several.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return None
    if sharding is None:
        found = [explicit_sharding(leaf) for leaf in leaves]
    else:
        found = _broadcast(sharding, tree)
    meshes = [each.mesh for each in found if isinstance(each, NamedSharding)]
    if not meshes and sharding is None:
        return _chosen(tree, others)
    mesh = meshes[0] if meshes else jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            "`sharding` holds PartitionSpecs, but there is no mesh. Pass NamedShardings"
            " or call under `jax.set_mesh(mesh)`."
        )
    for other in meshes:
        if dict(other.shape) != dict(mesh.shape):
            raise ValueError(
                "All leaves must live on one mesh, got"
                f" {dict(mesh.shape)} and {dict(other.shape)}."
            )
    specs = (
        PartitionSpec() if s is None else s.spec if isinstance(s, NamedSharding) else s
        for s in found
    )
    return Placement(mesh, tuple(specs))


def _chosen(tree: chex.ArrayTree, others: Any) -> Placement | None:
    """Return the division that the step chooses on the mesh that the types name."""
    mesh = auto.mesh_of(jax.tree.leaves((tree, others)))
    if mesh is None:
        return None
    avals = [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]
    specs, shapes = zip(*auto.divide(avals, dict(mesh.shape)), strict=True)
    return Placement(mesh, specs, shapes)


def everywhere(tree: chex.ArrayTree, mesh: Any) -> Placement:
    """Return the placement of the whole of `tree` on every device of `mesh`."""
    shapes = tuple(map(jnp.shape, jax.tree.leaves(tree)))
    return Placement(mesh, (PartitionSpec(),) * len(shapes), shapes)


def _broadcast(sharding: Any, tree: chex.ArrayTree) -> list[Any]:
    """Return the entry of the prefix `sharding` for each leaf of `tree`."""
    is_leaf = lambda node: (
        isinstance(node, NamedSharding | PartitionSpec) or is_variable(node)
    )
    given = []
    for path, each in jax.tree_util.tree_leaves_with_path(sharding, is_leaf=is_leaf):
        each = each.get_value() if is_variable(each) else each
        if not isinstance(each, NamedSharding | PartitionSpec):
            raise TypeError(
                "`sharding` must be a tree of NamedShardings or PartitionSpecs, got"
                f" {each!r} at {leaf_name(path)}."
            )
        given.append((names_of(path), each))
    return broadcast(
        tuple(given),
        tree,
        lambda name, _: ValueError(
            f"`sharding` has no entry for the parameter {name}. Give it a"
            " NamedSharding or a PartitionSpec; `PartitionSpec()` replicates it."
        ),
    )


def explicit_sharding(leaf: Any) -> NamedSharding | None:
    """Return the sharding in the type of `leaf`, with a concrete mesh if it has one."""
    sharding = auto.sharding_of(leaf)
    if sharding is None:
        return None
    kinds = set(sharding.mesh.axis_types)
    told = jax.typeof(leaf).sharding if isinstance(leaf, jax.Array) else sharding
    if kinds == {AxisType.Auto, AxisType.Explicit} and any(told.spec):
        raise ValueError(
            "Parameters live on a mesh with both Auto and Explicit axes, whose types"
            " tell only a part of their sharding. Pass the whole as `sharding`."
        )
    return sharding if kinds == {AxisType.Explicit} else None


def beside(state: Any, params: chex.ArrayTree) -> Any:
    """Return `state` on the one device that `params` are committed to, if they are."""
    leaves = jax.tree.leaves(params)
    is_held = lambda x: isinstance(x, jax.Array) and not isinstance(x, Tracer)
    if not leaves or not all(is_held(leaf) and leaf.committed for leaf in leaves):
        return state
    devices = set().union(*(leaf.devices() for leaf in leaves))
    return jax.device_put(state, *devices) if len(devices) == 1 else state


def layout(
    tree: chex.ArrayTree, dtype: jax.typing.DTypeLike, placement: Placement | None
) -> Layout:
    """Return the layout of `tree` on each device of `placement`.

    Raises:
        ValueError: A partition does not fit its leaf or the mesh.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    avals = [(jnp.shape(leaf), jnp.result_type(leaf)) for _, leaf in paths]
    if placement is None:
        leaves = (Leaf(shape, kind, ((),) * len(shape), shape) for shape, kind in avals)
        return Layout(treedef, tuple(leaves), jnp.dtype(dtype))
    sizes = dict(placement.mesh.shape)
    shapes = placement.shapes or tuple(shape for shape, _ in avals)
    local = []
    for (path, _), (whole, kind), shape, spec in zip(
        paths, avals, shapes, placement.specs, strict=True
    ):
        held = _shard_shape(leaf_name(path), shape, placement.mesh, spec)
        names = [axes_of(entry) for entry in spec] + [()] * (len(shape) - len(spec))
        local.append(Leaf(held, kind, tuple(names), whole))
    used = {axis for leaf in local for axis in leaf.axes}
    split = tuple(axis for axis in sizes if axis not in used and sizes[axis] > 1)
    chosen = placement.shapes is not None
    mesh = tuple(sizes.items())
    return Layout(treedef, tuple(local), jnp.dtype(dtype), mesh, split, chosen)


def _shard_shape(name: str, shape: Any, mesh: Any, spec: PartitionSpec) -> Any:
    """Return the shape of a device's part of a leaf, or raise, naming the leaf."""
    try:
        if len(spec) > len(shape):
            raise ValueError("It has more entries than the array has axes.")
        return NamedSharding(mesh, spec).shard_shape(shape)
    except Exception as error:  # JAX raises several kinds of them
        raise ValueError(
            f"The sharding {spec} does not fit {name} of shape {shape} on the mesh"
            f" {dict(mesh.shape)}. {error}"
        ) from error


def axes_of(entry: Any) -> tuple[Any, ...]:
    """Return the mesh axes that an entry of a `PartitionSpec` names."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)

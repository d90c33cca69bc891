"""Where the leaves of a tree live, and where a step divides them if nothing says so.

Under Explicit mesh axes the shardings are part of the arrays' types. Under Auto axes a
traced function sees the mesh alone: they are given, in JAX's own types, or the step
divides every leaf by its shape and the mesh, so that the state has the same layout
however the parameters are placed, and whether anything is traced or not.

Small trees are then brought to every device whole, so that the results are those of one
device, blocks and all. Leaves of larger ones are divided along their first or last
axis, or both, over all mesh axes, and padded with zeros where that does not go evenly.
Zeros are never selected, add nothing to inner products, and are cut off again.
"""

from collections.abc import Mapping
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efcp_jax.devices.layout import Layout, Leaf
from efcp_jax.devices.trees import broadcast, leaf_name, names_of, strip_boxes


# Trees of up to this many entries are brought to every device.
GATHERED = 2**20


class Placement(NamedTuple):
    """The mesh a tree is spread over, and how its leaves are."""

    mesh: Any  # concrete or abstract
    specs: tuple[PartitionSpec, ...]
    # What the leaves are padded to where the step has chosen a division of its own.
    shapes: tuple[tuple[int, ...], ...] | None = None


def find(tree: Any, sharding: Any = None, *others: Any) -> Placement | None:
    """Return how `tree` is placed, or None for a step on one device.

    By `sharding`, a tree prefix of `NamedSharding`s or, under an ambient mesh, of
    `PartitionSpec`s; by the types of the leaves if it is None. Types of `others` may
    name the mesh where those of `tree` do not.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return None
    if sharding is None:
        found = [explicit_sharding(leaf) for leaf in leaves]
    else:
        found = _given(sharding, tree)
    meshes = [each.mesh for each in found if isinstance(each, NamedSharding)]
    if not meshes and sharding is None:
        mesh = _auto_mesh(jax.tree.leaves((tree, others)))
        avals = [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
        return None if mesh is None else Placement(mesh, *divide(avals, mesh.shape))
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
    specs: Any = tuple(getattr(at, "spec", at) or PartitionSpec() for at in found)
    return Placement(mesh, specs)


def _given(sharding: Any, tree: Any) -> list[Any]:
    """Return the entry of the prefix `sharding` for each leaf of `tree`."""
    given = []
    for path, each in jax.tree_util.tree_leaves_with_path(strip_boxes(sharding)):
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


def _sharding_of(leaf: Any) -> NamedSharding | None:
    """Return the sharding on a mesh that a leaf has, or a traced one in its type."""
    traced = isinstance(leaf, Tracer)
    sharding = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None)
    known = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    return sharding if known else None


def explicit_sharding(leaf: Any) -> NamedSharding | None:
    """Return the sharding in the type of `leaf`, with a concrete mesh if it has one."""
    sharding = _sharding_of(leaf)
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


def _auto_mesh(leaves: list[Any]) -> Any:
    """Return the mesh with Auto axes that `leaves` name, a concrete one if any is.

    While a function is traced, leaves that name no mesh live on the ambient one.
    """
    meshes = [at.mesh for at in map(_sharding_of, leaves) if at is not None]
    if not meshes and any(isinstance(leaf, Tracer) for leaf in leaves):
        meshes = [jax.sharding.get_abstract_mesh()]
    meshes = [mesh for mesh in meshes if set(mesh.axis_types) == {AxisType.Auto}]
    alike = all(dict(mesh.shape) == dict(meshes[0].shape) for mesh in meshes)
    if not meshes or meshes[0].size == 1 or not alike:
        return None
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), meshes[0])


def divide(leaves: list[tuple[Any, Any]], sizes: Mapping[str, int]) -> tuple[Any, Any]:
    """Return specs and padded shapes of leaves, of shape and dtype, on axes `sizes`."""
    whole = sum(math.prod(shape) for shape, _ in leaves) <= GATHERED
    one = lambda shape, dtype: (
        (PartitionSpec(), shape) if whole else _divided(shape, dtype, sizes)
    )
    specs, shapes = zip(*itertools.starmap(one, leaves), strict=True)
    return specs, shapes


def _divided(shape: tuple[int, ...], dtype: Any, sizes: Mapping[str, int]) -> Any:
    """Return spec and padded shape of a leaf: with as little padding as there can be.

    And then with the shortest sides, which makes low-rank factors small.
    """
    shape = shape or (1,)
    names = [name for name, size in sizes.items() if size > 1]
    # The real and imaginary parts of a complex leaf lie side by side.
    sides = {0} if jnp.issubdtype(dtype, jnp.complexfloating) else {0, len(shape) - 1}

    def division(choice: tuple[int, ...]) -> Any:
        pairs = list(zip(names, choice, strict=True))
        axes = [[name for name, side in pairs if side == i] for i in range(len(shape))]
        ways = [math.prod(sizes[name] for name in each) for each in axes]
        local = [-(-n // way) for n, way in zip(shape, ways, strict=True)]
        padded = tuple(n * way for n, way in zip(local, ways, strict=True))
        spec = PartitionSpec(*(tuple(each) or None for each in axes))
        return (math.prod(local), math.prod(local[:-1]) + local[-1]), (spec, padded)

    choices = itertools.product(sorted(sides), repeat=len(names))
    return min(map(division, choices), key=lambda found: found[0])[1]


def layout(tree: Any, dtype: Any, placement: Placement | None) -> Layout:
    """Return the layout of `tree` on each device of `placement`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    avals = [(jnp.shape(leaf), jnp.result_type(leaf)) for _, leaf in paths]
    if placement is None:
        leaves = (Leaf(shape, kind, ((),) * len(shape), shape) for shape, kind in avals)
        return Layout(treedef, tuple(leaves), jnp.dtype(dtype))
    mesh, specs, shapes = placement
    local = []
    for (path, _), (whole, kind), shape, spec in zip(
        paths, avals, shapes or [shape for shape, _ in avals], specs, strict=True
    ):
        held = _shard_shape(leaf_name(path), shape, mesh, spec)
        names = [axes_of(entry) for entry in spec] + [()] * (len(shape) - len(spec))
        local.append(Leaf(held, kind, tuple(names), whole))
    used = {axis for leaf in local for axis in leaf.axes}
    sizes = tuple(mesh.shape.items())
    split = tuple(axis for axis, size in sizes if axis not in used and size > 1)
    chosen = shapes is not None
    return Layout(treedef, tuple(local), jnp.dtype(dtype), sizes, split, chosen)


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

"""Shardings of parameters, and states described without arrays."""

from typing import Any, TypeGuard

import chex
import jax
from jax.core import Tracer
import numpy as np
import optax

from efcp_jax.devices import placement
from efcp_jax.devices.boxes import strip_boxes
from efcp_jax.devices.description import Description, describing


def describe(tx: optax.GradientTransformation, params: chex.ArrayTree) -> Any:
    """Return the state with `Description`s and `ShapeDtypeStruct`s for leaves."""
    found = []

    def init(tree):
        with describing():
            state = tx.init(tree)
        found.append(
            jax.tree.map(
                lambda leaf: (
                    leaf
                    if isinstance(leaf, Description)
                    else jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
                ),
                state,
            )
        )

    jax.eval_shape(init, params)
    return found[0]


def param_shardings(params: chex.ArrayTree, sharding: Any, described: Any) -> Any:
    """Return one sharding a parameter."""
    treedef = jax.tree.structure(params)
    inside = jax.tree.structure(strip_boxes(params))
    if sharding is None:
        held = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
        named = [each.mesh for each in held if is_named(each)]
        for each in jax.tree.leaves(described):
            # A transformation of all parameters knows, even where arrays do not.
            placed = each.placement if isinstance(each, Description) else None
            if placed is not None and placed.shapes is None:
                layout = each.space.layout
                if layout.treedef == inside:
                    mesh = concrete_mesh([placed.mesh, *named])
                    return treedef.unflatten(
                        jax.sharding.NamedSharding(mesh, spec) for spec in placed.specs
                    )
        if not named:
            return treedef.unflatten(held)
        everywhere = jax.sharding.NamedSharding(
            concrete_mesh(named), jax.sharding.PartitionSpec()
        )
        return treedef.unflatten(
            each if is_named(each) else everywhere for each in held
        )
    placed = placement.find(strip_boxes(params), sharding)
    assert placed is not None
    mesh = concrete_mesh([placed.mesh])
    return treedef.unflatten(
        jax.sharding.NamedSharding(mesh, spec) for spec in placed.specs
    )


def is_named(sharding: Any) -> TypeGuard[jax.sharding.NamedSharding]:
    """Return whether `sharding` names the axes of a mesh."""
    return isinstance(sharding, jax.sharding.NamedSharding)


def concrete_mesh(meshes: list[Any]) -> Any:
    """Return a mesh of devices if there is one among `meshes` or around, else any."""
    meshes = [mesh for mesh in meshes if mesh is not None]
    if not meshes:
        return None
    ambient = jax.sharding.get_mesh()
    for mesh in [*meshes, ambient]:
        alike = dict(mesh.shape) == dict(meshes[0].shape)
        if alike and isinstance(mesh, jax.sharding.Mesh):
            return mesh
    return meshes[0]


def device_of(params: chex.ArrayTree) -> Any:
    """Return the first device that holds parameters, or the first there is."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            return min(leaf.devices(), key=lambda device: device.id)
    return jax.local_devices()[0]


def place(array: Any, sharding: Any) -> Any:
    """Return `array` of the host on the devices of `sharding`."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

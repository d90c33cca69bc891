"""The state of a transformation, described instead of made.

What knows the parameters' placement can tell the placement of the state: that is how
`efcp_jax.sharding` finds shardings and shapes without arrays.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import dataclasses
import math
from typing import Any

import chex
import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
import numpy as np
import optax

from efcp_jax.devices.placement import Placement, axes_of, find
from efcp_jax.devices.spread import run
from efcp_jax.devices.trees import strip_boxes


@dataclasses.dataclass(frozen=True)
class Description:
    """The state of one transformation, described instead of made.

    Attributes:
        space: The representation, which knows the layout.
        placement: Where the state lives; None on one device.
        arrays: `jax.ShapeDtypeStruct`s of the global arrays, in the state's structure.
        specs: One `PartitionSpec` an array.
    """

    space: Any
    placement: Placement | None
    arrays: Any
    specs: tuple[PartitionSpec, ...]


_DESCRIBING = contextvars.ContextVar("efcp_jax_describing", default=False)


@contextlib.contextmanager
def describing() -> Iterator[None]:
    """Let every `init` of this package return a `Description` for its state."""
    token = _DESCRIBING.set(True)
    try:
        yield
    finally:
        _DESCRIBING.reset(token)


def asked() -> bool:
    """Return whether states are to be described instead of made."""
    return _DESCRIBING.get()


def start(
    init: Callable[[Any], Any],
    space: Any,
    placement: Placement | None,
    specs: Any,
    params: Any,
) -> Any:
    """Return the state `init(space)` of `params`, made on each device for itself."""
    if asked():
        arrays = global_arrays(jax.eval_shape(lambda: init(space)), specs, placement)
        return Description(space, placement, arrays, tuple(_spec_leaves(specs)))
    return run(lambda: init(space), placement, (), specs, beside=params)


def global_arrays(local: Any, specs: Any, placement: Placement | None) -> Any:
    """Return the `jax.ShapeDtypeStruct`s of arrays whose parts on a device are given.

    Args:
        local: Tree of arrays or structs, the parts of one device.
        specs: Tree of `PartitionSpec`s, a prefix of `local`.
        placement: The mesh; None on one device.

    Returns:
        Tree of the structure of `local`.
    """
    sizes = {} if placement is None else dict(placement.mesh.shape)

    def whole(spec: PartitionSpec, leaf: Any) -> jax.ShapeDtypeStruct:
        ways = [math.prod(sizes.get(a, 1) for a in axes_of(entry)) for entry in spec]
        ways += [1] * (len(leaf.shape) - len(ways))
        shape = tuple(n * w for n, w in zip(leaf.shape, ways, strict=True))
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    leaves, treedef = jax.tree.flatten(local)
    pairs = zip(_spec_leaves(specs), leaves, strict=True)
    return treedef.unflatten([whole(*pair) for pair in pairs])


def _spec_leaves(specs: Any) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def describe(tx: optax.GradientTransformation, params: chex.ArrayTree) -> Any:
    """Return the state with `Description`s and `ShapeDtypeStruct`s for leaves."""
    found = []

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Description):
            return leaf
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)

    def init(tree):
        with describing():
            found.append(jax.tree.map(one, tx.init(tree)))

    jax.eval_shape(init, params)
    return found[0]


def state_shardings(
    tx: optax.GradientTransformation, params: chex.ArrayTree, sharding: Any
) -> Any:
    """Return what `efcp_jax.sharding.state_shardings` does."""
    described = describe(tx, params)
    mesh, given = _param_shardings(params, sharding, described)
    if mesh is None:
        alone: Any = SingleDeviceSharding(_device_of(params))
        given = [alone] * len(given)
    else:
        alone = NamedSharding(mesh, PartitionSpec())
    divided = not all(each.is_fully_replicated for each in given)

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Description):
            return alone
        if leaf.placement is not None:
            on = _concrete([mesh, leaf.placement.mesh])
            each = [NamedSharding(on, spec) for spec in leaf.specs]
            return jax.tree.structure(leaf.arrays).unflatten(each)
        if divided:
            raise ValueError(
                "Parameters are divided among devices in a way that a traced step"
                " cannot see. Pass `sharding` to the transformation, or make the"
                " mesh with Explicit axes."
            )
        return jax.tree.map(lambda _: alone, leaf.arrays)

    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    with describing():
        return optax.tree.map_params(
            tx,
            lambda leaf, at: leaf if is_masked(leaf) else at,
            described,
            jax.tree.structure(params).unflatten(given),
            transform_non_params=own,
            is_leaf=is_masked,
        )


def _param_shardings(
    params: chex.ArrayTree, sharding: Any, described: Any
) -> tuple[Any, list[Any]]:
    """Return the mesh, None on one device, and one sharding a parameter."""
    held = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    meshes = [each.mesh for each in held if isinstance(each, NamedSharding)]
    plain = strip_boxes(params)

    def knows(each: Any) -> bool:
        """Return whether it is of all parameters, and was told where they are."""
        at = each.placement if isinstance(each, Description) else None
        if at is None or at.shapes is not None:
            return False
        return each.space.layout.treedef == jax.tree.structure(plain)

    told = (each.placement for each in jax.tree.leaves(described) if knows(each))
    placed = next(told, None) if sharding is None else find(plain, sharding)
    if placed is not None:
        mesh = _concrete([placed.mesh, *meshes])
        return mesh, [NamedSharding(mesh, spec) for spec in placed.specs]
    mesh = _concrete(meshes)
    named = lambda each: isinstance(each, NamedSharding)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return mesh, [each if named(each) else everywhere for each in held]


def _concrete(meshes: list[Any]) -> Any:
    """Return a mesh of devices if there is one among `meshes` or around, else any."""
    meshes = [mesh for mesh in meshes if mesh is not None]
    if not meshes:
        return None
    alike = lambda mesh: dict(mesh.shape) == dict(meshes[0].shape)
    for mesh in filter(alike, [*meshes, jax.sharding.get_mesh()]):
        if isinstance(mesh, jax.sharding.Mesh):
            return mesh
    return meshes[0]


def _device_of(params: chex.ArrayTree) -> Any:
    """Return the first device that holds parameters, or the first there is."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            return min(leaf.devices(), key=lambda device: device.id)
    return jax.local_devices()[0]

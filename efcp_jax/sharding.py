"""Many devices: where the state lives, and how to carry it to other devices.

The step runs on all devices at once (`jax.shard_map`), each on its share of every
parameter. Nothing needs to be said about where the parameters live:

* under Explicit mesh axes (the default of `jax.make_mesh`) their types tell it, and the
  shares are the shards;
* under Auto axes their types tell the mesh alone. The step divides every parameter over
  all mesh axes in a way of its own, along the longer side, and the partitioner brings
  the gradient there and the update back: each device sends and receives its share, d
  over the number of devices. Trees of up to 2^20 entries are gathered whole instead, so
  that results are those of one device;
* the `sharding` argument of the transformation saves that way under Auto axes. It is
  one `NamedSharding`, or a `PartitionSpec` under `jax.set_mesh`, for all parameters or
  for each.

State made before the parameters were on the mesh is that of one device, and remains so:
call `init` with parameters that are where they will be, or under `jax.set_mesh`. Inside
of `jax.shard_map` a transformation without `sharding` is one of that device, with the
gradient that is there and a state of its own, which `init` makes there.

The window and the error are divided over *all* mesh axes, so bytes a device fall as one
over the number of devices; only the m x m Gram matrix and counters are on every device.
(Low rank: each factor is divided as its side of the matrix is, so matrices are best
sharded along both sides.) With parameters sharded over every mesh axis an update
exchanges m numbers and a metric's, with replicated ones the update too.

Selection by `top_k` is made in blocks: those of one device where parameters are
replicated, and of its own shards on each device where they are sharded. Results are
those of one device where blocks hold the same entries, and otherwise those of the same
method with another choice of blocks. `block_size=None` means one block a device.
`identity` and `low_rank` have no blocks to align.
"""

from typing import Any

import chex
import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
import numpy as np
import optax

from efcp_jax.devices.placement import find
from efcp_jax.devices.positions import convert
from efcp_jax.devices.spread import Description, described
from efcp_jax.devices.trees import strip_boxes


_is_own = lambda node: isinstance(node, Description)


def state_shardings(
    tx: optax.GradientTransformation, params: chex.ArrayTree, sharding: Any = None
) -> Any:
    """Return the sharding of every array of `tx.init(params)`, allocating nothing.

    Fields of this package's states get those of the step, trees of other
    transformations that mirror the parameters (momentum) get the parameters', and all
    else is replicated. A `PartitionSpec` is the `spec` of a `NamedSharding`.

    Args:
        tx: Any gradient transformation, chained, masked or wrapped.
        params: Parameters, or `jax.ShapeDtypeStruct`s with shardings.
        sharding: Where the parameters live, as a tree prefix; None to take it from
            `params`.

    Returns:
        A tree of `jax.sharding.Sharding` in the structure of the state, for
        `jax.jit(out_shardings=...)`, `jax.device_put` and checkpoints.

    Raises:
        ValueError: Parameters are divided among devices, but a transformation of this
            package would not know: they live under Auto axes and it has no `sharding`.

    Examples:
        >>> import efcp_jax, jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh(
        ...     (jax.device_count(),), ("data",), axis_types=(AxisType.Explicit,)
        ... )
        >>> params = jax.device_put(jnp.zeros((16, 16)), NamedSharding(mesh, P("data")))
        >>> tx = efcp_jax.mfac(1e-2, window_size=4)
        >>> shardings = efcp_jax.sharding.state_shardings(tx, params)
        >>> shardings[0].window.rows.spec == P(("data",))
        True
        >>> with jax.set_mesh(mesh):
        ...     state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    state = _describe(tx, params)
    mesh, given = _param_shardings(params, sharding, state)
    alone = _alone(params) if mesh is None else NamedSharding(mesh, PartitionSpec())
    given = [each or alone for each in given]

    def own(leaf: Any) -> Any:
        if not _is_own(leaf):
            return alone
        if leaf.placement is not None:
            on = _concrete(mesh, leaf.placement.mesh)
            return jax.tree.map(lambda spec: NamedSharding(on, spec), leaf.specs)
        if not all(each.is_fully_replicated for each in given):
            raise ValueError(
                "Parameters are divided among devices in a way that a traced step"
                " cannot see. Pass `sharding` to the transformation, or make the"
                " mesh with Explicit axes."
            )
        return jax.tree.map(lambda _: alone, leaf.arrays)

    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    kept = lambda leaf, at: leaf if is_masked(leaf) else at
    tree = jax.tree.structure(params).unflatten(given)
    how = {"transform_non_params": own, "is_leaf": is_masked}
    return described(optax.tree.map_params, tx, kept, state, tree, **how)


def abstract_state(
    tx: optax.GradientTransformation, params: chex.ArrayTree
) -> chex.ArrayTree:
    """Return the shapes and dtypes of `tx.init(params)`, without the devices.

    Unlike `jax.eval_shape(tx.init, params)` it needs no mesh of real devices, so a
    program on 4 devices can tell the shapes of a state that 8 have saved.

    Args:
        tx: Any gradient transformation.
        params: Parameters, or `jax.ShapeDtypeStruct`s, with shardings on a mesh that
            may be a `jax.sharding.AbstractMesh`.

    Returns:
        A tree of `jax.ShapeDtypeStruct`, without shardings.
    """
    struct = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    expand = lambda leaf: leaf.arrays if _is_own(leaf) else struct(leaf)
    return jax.tree.map(expand, _describe(tx, params), is_leaf=_is_own)


def reshard_state(
    state: chex.ArrayTree,
    source: tuple[optax.GradientTransformation, chex.ArrayTree],
    target: tuple[optax.GradientTransformation, chex.ArrayTree],
) -> chex.ArrayTree:
    """Carry a state made on some devices over to others.

    The global shapes of a state depend on the devices that made it: blocks are padded
    to divide among them, and each packs its own shards. This moves every number to its
    place in the new layout; nothing is rounded or recomputed, so training goes on with
    equal results. Once a restart, on the host, one array at a time. Only values and
    errors of 8 bits are rounded anew, and only where numbers that share a scale come
    from several.

    Args:
        state: The state, of NumPy arrays or of arrays that this process can read.
        source: The transformation and the parameters that `state` was made for. The
            parameters may be `jax.ShapeDtypeStruct`s with shardings on a
            `jax.sharding.AbstractMesh` of devices that are gone.
        target: The transformation and the parameters to go on with.

    Returns:
        The state `target` goes on with, on its devices.

    Raises:
        ValueError: The states differ in more than their layout, or a block of
            `top_k` in the new layout holds more kept entries of one row than it has
            room for. Blocks that hold the same entries in both layouts always fit.
    """

    def place(array: Any, at: Any) -> Any:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, at, lambda part: array[part])

    def one(before: Any, after: Any, part: Any, at: Any) -> Any:
        part = convert(part, before, after) if _is_own(before) else part
        return jax.tree.map(place, part, at)

    each = _describe(*source), _describe(*target), state, state_shardings(*target)
    return jax.tree.map(one, *each, is_leaf=_is_own)


def _describe(tx: optax.GradientTransformation, params: chex.ArrayTree) -> Any:
    """Return the structs of the state, with a `Description` for each of our own."""
    new = lambda tree: tx.init(tree)  # JAX may know a state of an old function
    return described(jax.eval_shape, new, params)


def _param_shardings(params: Any, sharding: Any, state: Any) -> tuple[Any, list[Any]]:
    """Return the mesh, None on one device, and the sharding of each parameter on it."""
    held = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    held = [each if isinstance(each, NamedSharding) else None for each in held]
    meshes = [each and each.mesh for each in held]
    plain = strip_boxes(params)
    own = filter(_is_own, jax.tree.leaves(state, is_leaf=_is_own))
    told = (each.placement for each in own if each.told(plain))
    placed = next(told, None) if sharding is None else find(plain, sharding)
    if placed is None:
        return _concrete(*meshes), held
    mesh = _concrete(placed.mesh, *meshes)
    return mesh, [NamedSharding(mesh, spec) for spec in placed.specs]


def _concrete(*meshes: Any) -> Any:
    """Return the first mesh of devices among `meshes` and the ambient one, else any."""
    known = [mesh for mesh in meshes if mesh is not None]
    alike = lambda mesh: dict(mesh.shape) == dict(known[0].shape)
    around = [*known, jax.sharding.get_mesh()] if known else []
    found = (mesh for mesh in around if isinstance(mesh, Mesh) and alike(mesh))
    return next(found, known[0] if known else None)


def _alone(params: chex.ArrayTree) -> SingleDeviceSharding:
    """Return the first device that holds parameters, or the first there is."""
    leaves = (x for x in jax.tree.leaves(params) if not isinstance(x, Tracer))
    held = (leaf.devices() for leaf in leaves if isinstance(leaf, jax.Array))
    devices = next(held, jax.local_devices())
    return SingleDeviceSharding(min(devices, key=lambda device: device.id))

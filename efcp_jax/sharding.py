"""Many devices: where the state lives, and how to carry it to other devices.

The step runs on all devices at once (`jax.shard_map`), each on its share of every
parameter. Nothing needs to be said about where the parameters live:

* under Explicit mesh axes (the default of `jax.make_mesh`) their types tell it, and the
  shares are the shards;
* under Auto axes their types tell the mesh alone. The step divides every parameter over
  all mesh axes in a way of its own, along the longer side, and the partitioner brings
  the gradient there and the update back: where the parameters are divided otherwise,
  each device sends and receives its share, d over the number of devices. Trees of up to
  2^20 entries are gathered whole instead, so that results are those of one device;
* the `sharding` argument of the transformation tells it under Auto axes, in JAX's own
  types: one `NamedSharding`, or a `PartitionSpec` under `jax.set_mesh`, for all
  parameters or for each. It saves that way there and back.

State made before the parameters were on the mesh is that of one device, and remains so:
call `init` with parameters that are where they will be, or under `jax.set_mesh`.

The window and the error are divided over *all* mesh axes, so bytes a device fall as one
over the number of devices; only the m x m Gram matrix and counters are on every device.
(Low rank: each factor is divided as its side of the matrix is, so matrices are best
sharded along both sides.)

| parameters | collectives of an update |
|---|---|
| replicated (data parallel) | all-reduce of m floats, all-gather of the update |
| sharded over every mesh axis (FSDP, tensor parallel, both) | all-reduce of m floats |
| sharded over some axes, none over others | both, the all-gather over *idle* axes |

An axis is idle if it shards no parameter at all. The state is divided over idle axes as
by ZeRO, which costs the all-gather of each device's shard of the update. To have the
single all-reduce, shard the parameters over those axes too. A leaf that is replicated
while others are sharded (a bias beside FSDP matrices) is held by all devices of the
axis, packed in blocks of its own, and weighs one over their number in inner products:
keep large leaves sharded.

A metric, which optimizers have by default, adds an all-reduce for each set of mesh axes
that cuts matrices, of a number for each row or column that is cut. Where parameters are
replicated there is none.

Inside of `jax.shard_map` a transformation without `sharding` is one of that device: it
steps with the gradient that is there and a state of its own, which `init` makes there.

Low rank adds a few all-reduces of the small factors, r numbers a column and r^2 a leaf,
each of them one collective for all leaves together. Where parameters are replicated,
the leaves of every shape are gathered together, each entry once.

Selection by `top_k` is made in blocks. With parameters replicated the blocks are those
of one device, so are the results. With parameters sharded, each device cuts its own
shards into blocks; results are those of one device where blocks hold the same entries,
and otherwise those of the same method with another choice of blocks. `block_size=None`
means one block a device. `identity` and `low_rank` have no blocks to align.
"""

from typing import Any

import chex
import jax
import numpy as np
import optax

from efcp_jax.devices import description
from efcp_jax.devices.collectives import collectives as collectives
from efcp_jax.devices.description import Description, describe
from efcp_jax.devices.reshard import convert


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
    return description.state_shardings(tx, params, sharding)


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
    expand = lambda leaf: leaf.arrays if isinstance(leaf, Description) else leaf
    return jax.tree.map(expand, describe(tx, params))


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
    old, new = (describe(*each) for each in (source, target))

    def place(array: Any, at: Any) -> Any:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, at, lambda part: array[part])

    def one(before: Any, after: Any, part: Any, at: Any) -> Any:
        if isinstance(before, Description):
            part = convert(part, before, after)
        return jax.tree.map(place, part, at)

    return jax.tree.map(one, old, new, state, state_shardings(*target))

"""Steps compiled for pods of TPUs that are not there; nothing is allocated."""

import contextlib
import math

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

import efcp_jax
from efcp_jax.sharding import abstract_state, state_shardings


PODS = {16: "v5e:4x4", 256: "v5e:16x16"}
# Names and sizes of mesh axes, and the partition of matrices and of vectors.
MESHES = {
    "data": (lambda n: {"x": n}, P(), P()),
    "fsdp": (lambda n: {"x": n}, P("x"), P("x")),
    "2-D": (lambda n: dict.fromkeys("xy", math.isqrt(n)), P("x", "y"), P(("x", "y"))),
}
WIDTH, HIDDEN, LAYERS = 1024, 2816, 2
ROWS = 64
COMPRESSORS = {
    "dense": efcp_jax.identity(),
    "top_k": efcp_jax.top_k(2 / 128, block_size=128, value_dtype=jnp.bfloat16),
    "large blocks": efcp_jax.top_k(
        41 / 4096, block_size=4096, value_dtype=jnp.bfloat16
    ),
    "top_k, 1 of 128": efcp_jax.top_k(
        1 / 128, block_size=128, value_dtype=jnp.bfloat16
    ),
    "low_rank": efcp_jax.low_rank(4, value_dtype=jnp.bfloat16),
}


def transformer(width=WIDTH, hidden=HIDDEN, layers=LAYERS):
    """Return the shapes of a transformer with gated layers, without its embedding."""
    square, up, down = (width, width), (width, hidden), (hidden, width)
    layer = dict.fromkeys("qkvo", square) | {"gate": up, "up": up, "down": down}
    return {str(i): layer | {"norm": (width,)} for i in range(layers)}


def entries(shapes):
    leaves = jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))
    return sum(map(math.prod, leaves))


def on_pod(chips, placing, kind, shapes):
    """Return the mesh, and parameters without data there."""
    axes, matrices, vectors = MESHES[placing]
    sizes = axes(chips)
    topology = topologies.get_topology_desc(PODS[chips], "tpu")
    devices = np.array(topology.devices).reshape(tuple(sizes.values()))
    mesh = Mesh(devices, tuple(sizes), axis_types=(kind,) * len(sizes))
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(
            shape,
            jnp.float32,
            sharding=NamedSharding(mesh, matrices if len(shape) == 2 else vectors),
        ),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return mesh, params


def bytes_a_chip(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compiled(compressor, chips, placing, how, shapes=None, rows=ROWS):
    """Return the compiled step, and the state without data.

    Args:
        compressor: Name of a compressor.
        chips: Number of chips.
        placing: How parameters are divided.
        how: "explicit" for types that tell it, "told" for the argument, "auto" for
            neither.
        shapes: Shapes of the parameters.
        rows: Rows of the window.
    """
    kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
    mesh, params = on_pod(chips, placing, kind, shapes or transformer())
    sharding = jax.tree.map(lambda leaf: leaf.sharding, params)
    tx = efcp_jax.scale_by_mfac(
        rows,
        compressor=COMPRESSORS[compressor],
        sharding=sharding if how == "told" else None,
    )
    with contextlib.nullcontext() if how == "auto" else jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            abstract_state(tx, params),
            state_shardings(tx, params),
        )
        step = jax.jit(tx.update, donate_argnums=1)
        return step.lower(params, state, params).compile(), state

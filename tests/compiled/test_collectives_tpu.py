"""Steps compiled for pods of TPUs: what is sent, and what a chip holds.

No chip is needed: `libtpu` compiles for a topology that is described to it.
"""

import contextlib
import math
import os

import compiling
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import efcp_jax
from efcp_jax.sharding import abstract_state, collectives, state_shardings


pytestmark = [
    pytest.mark.compile_tpu,
    pytest.mark.skipif(
        compiling.missing("tpu") is not None, reason="`libtpu` is not installed"
    ),
]

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
    "low_rank": efcp_jax.low_rank(4, value_dtype=jnp.bfloat16),
}


@pytest.fixture(scope="module", autouse=True)
def described_chips():
    """Tell `libtpu` not to look for chips, nor to wait for whoever uses them."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


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


@pytest.mark.parametrize(
    ("compressor", "chips", "placing", "how"),
    [
        ("dense", 16, "fsdp", "explicit"),
        ("dense", 16, "2-D", "told"),
        ("dense", 256, "fsdp", "told"),
        ("dense", 256, "2-D", "explicit"),
        ("top_k", 16, "fsdp", "told"),
        ("top_k", 16, "2-D", "explicit"),
        ("top_k", 256, "fsdp", "explicit"),
        ("top_k", 256, "2-D", "told"),
        ("large blocks", 256, "fsdp", "explicit"),
        ("large blocks", 16, "2-D", "told"),
        # The division that the step chooses is the same.
        ("top_k", 256, "2-D", "auto"),
    ],
)
def test_a_step_sums_as_many_numbers_as_the_window_has_rows(
    compressor, chips, placing, how
):
    program, state = compiled(compressor, chips, placing, how)
    assert collectives(program) == [("all-reduce", ROWS)]
    memory = program.memory_analysis()
    # Donated, the state is written where it is. What is new is the update, with rows
    # filled up to eight, and a table of pointers.
    assert memory.alias_size_in_bytes >= bytes_a_chip(state)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert new < 2 * 4 * entries(transformer()) / chips + 2**16


@pytest.mark.parametrize("chips", PODS)
@pytest.mark.parametrize(("placing", "times"), [("fsdp", 5), ("2-D", 8)])
def test_low_rank_sums_small_factors_a_few_times(chips, placing, times):
    program, _ = compiled("low_rank", chips, placing, "explicit")
    found = collectives(program)
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert len(found) == times
    factors = LAYERS * 4 * (6 * WIDTH + 6 * HIDDEN)
    assert max(size for _, size in found) <= factors


@pytest.mark.parametrize("chips", PODS)
def test_low_rank_of_replicated_parameters_gathers_every_entry_once(chips):
    width, hidden = 4096, 11008  # divide among the chips without filling up
    shapes = transformer(width, hidden, LAYERS)
    program, _ = compiled("low_rank", chips, "data", "explicit", shapes)
    found = collectives(program)
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce"}
    gathered = sum(size for kind, size in found if kind == "all-gather")
    summed = [size for kind, size in found if kind == "all-reduce"]
    # Short vectors the compiler gathers by a sum.
    vectors = LAYERS * width
    assert gathered in (entries(shapes), entries(shapes) - vectors)
    factors = LAYERS * 4 * (5 * width + 2 * hidden)
    assert max(summed) <= factors  # rows are divided: right factors, r a column
    assert len(summed) <= 6
    # The gradient is cut before it is stacked, so what is whole is the update alone.
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * entries(shapes)


def test_leaves_that_go_to_another_division_travel_by_shape():
    """Rows are given, but `gate` and `up` are longer along columns."""
    chips = 16
    program, _ = compiled("top_k", chips, "fsdp", "auto")
    found = collectives(program)
    assert found.count(("all-reduce", ROWS)) == 1
    moved = 2 * LAYERS * WIDTH * HIDDEN // chips
    there_and_back = [("all-to-all", moved)] * 2
    assert [each for each in found if each[0] != "all-reduce"] == there_and_back


@pytest.mark.parametrize("compressor", ["top_k", "low_rank"])
def test_a_state_made_without_the_mesh_is_stepped_whole(compressor):
    """Kernels for TPUs cannot be divided by the partitioner."""
    shapes = {"w": (1000, 250)}
    _, params = on_pod(16, "data", AxisType.Auto, shapes)
    tx = efcp_jax.scale_by_mfac(5, compressor=COMPRESSORS[compressor])
    alone = jax.eval_shape(tx.init, {"w": np.zeros(shapes["w"], np.float32)})
    everywhere = NamedSharding(params["w"].sharding.mesh, P())
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        alone,
    )
    step = jax.jit(tx.update, donate_argnums=1)
    program = step.lower(params, state, params).compile()
    assert collectives(program) == []


# A layer of a transformer of seven billion parameters, on 256 chips, beside what the
# README of the examples says a chip holds for each parameter.
@pytest.mark.parametrize(
    ("compressor", "placing", "share"),
    [
        ("dense", "fsdp", 4 * 64),
        ("large blocks", "fsdp", 64 * 41 / 4096 * 4 + 4),
        ("top_k", "2-D", 64 * 2 / 128 * 3 + 4),
    ],
)
def test_a_layer_of_a_large_model_is_held_as_the_cost_model_says(
    compressor, placing, share
):
    shapes = transformer(4096, 11008, 1)
    program, state = compiled(compressor, 256, placing, "explicit", shapes)
    share_of_all = entries(shapes) / 256
    small = 4 * ROWS**2 + 4 * ROWS + 16
    held = bytes_a_chip(state) - small
    assert 1 <= held / (share * share_of_all) < 1.02  # blocks fill tiles
    assert collectives(program) == [("all-reduce", ROWS)]
    # Beside the gradient, the update and the parameters, less than one more of them.
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * 4 * share_of_all + 2**20

"""Steps compiled for pods of TPUs: what is sent, and what a chip holds.

No chip is needed: `libtpu` compiles for a topology that is described to it.
"""

import os

from collectives import collectives
import compiling
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
from pods import (
    COMPRESSORS,
    HIDDEN,
    LAYERS,
    PODS,
    ROWS,
    WIDTH,
    bytes_a_chip,
    compiled,
    entries,
    on_pod,
    transformer,
)
import pytest

import efcp_jax


pytestmark = [
    pytest.mark.compile_tpu,
    pytest.mark.skipif(
        compiling.missing("tpu") is not None, reason="`libtpu` is not installed"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def described_chips():
    """Tell `libtpu` not to look for chips, nor to wait for whoever uses them."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


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
    # The gradient is cut before it is stacked, so what is whole is the update alone,
    # beside the shares and a part of the update on its way to where it is returned.
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 1.25 * 4 * entries(shapes)


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
    # Of 17 tiles, which are not one a chip.
    shapes = {"w": (1100, 250)}
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

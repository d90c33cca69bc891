"""Facts about the compiled step of sparse M-FAC, read off the program."""

import math
import os
import re

import chex
import jax
import jax.numpy as jnp
import pytest

import efcp_jax
from efcp_jax.preconditioners import system as systems


WINDOW = 48
SIZE = 40 * 4096  # 40 blocks


def compiled_as_by_default(lowered):
    """Return the program of users, whatever spares time in these tests."""
    flag = "xla_cpu_use_fusion_emitters"
    spared = f"--{flag}=false" in os.environ["XLA_FLAGS"]
    return lowered.compile(compiler_options={flag: True} if spared else None)


@pytest.fixture(params=[True, False], ids=["skip", "no_skip"], scope="module")
def compiled(request):
    tx = efcp_jax.scale_by_mfac(
        WINDOW,
        compressor=efcp_jax.top_k(0.05, block_size=4096, value_dtype=jnp.bfloat16),
        skip_nonfinite=request.param,
    )
    params = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=1)
    return compiled_as_by_default(step.lower(params, state)), state


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_state_takes_four_bytes_an_entry_plus_the_error(compiled):
    _, state = compiled
    kept = round(0.05 * 4096) * 40
    arithmetic = 4 * WINDOW * kept + 4 * SIZE
    assert bytes_of(state) == pytest.approx(arithmetic, rel=0.02)


def test_whole_state_is_donated(compiled):
    program, state = compiled
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == bytes_of(state)


def test_donated_window_is_never_copied(compiled):
    program, state = compiled
    shapes = {",".join(map(str, x.shape)) for x in jax.tree.leaves(state.window.rows)}
    copies = re.findall(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", program.as_text())
    assert not shapes & set(copies)


def test_no_window_of_values_or_offsets_is_materialised(compiled):
    program, state = compiled
    shape = ",".join(map(str, state.window.rows.shape))
    entry = program.as_text().split("ENTRY")[1]
    results = re.findall(r"= (\w+)\[" + shape + r"\]", entry)
    assert set(results) == {"u32"}  # a word holds a value and an offset


@pytest.mark.parametrize(
    ("leaves", "error_dtype"),
    [(1, "float32"), (45, "float32"), (45, "bfloat16"), (1, "int8")],
)
def test_temporaries_of_a_large_model_are_a_quarter_of_its_state_at_most(
    leaves, error_dtype
):
    size, window = 11_700_000, 256
    tx = efcp_jax.scale_by_mfac(
        window,
        compressor=efcp_jax.top_k(0.01, block_size=4096, value_dtype=jnp.bfloat16),
        error_dtype=error_dtype,
    )
    shape = jax.ShapeDtypeStruct((size // leaves,), jnp.float32)
    params = [shape] * leaves
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=1)
    program = compiled_as_by_default(step.lower(params, state))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == bytes_of(state)
    assert memory.temp_size_in_bytes < 0.25 * bytes_of(state)
    blocks = -(-size // 4096)
    error = jnp.dtype(error_dtype).itemsize * size
    arithmetic = 4 * window * round(0.01 * 4096) * blocks + error
    assert bytes_of(state) == pytest.approx(arithmetic, rel=0.02)


def test_temporaries_do_not_grow_with_the_window(compiled):
    program, state = compiled
    # At a density of 5% the selection looks at a quarter of the entries more than once.
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * bytes_of(state.error)


@pytest.mark.slow
def test_factor_of_a_large_window_is_carried_without_a_copy():
    window = systems._SMALLEST
    tx = efcp_jax.scale_by_mfac(window, compressor=efcp_jax.top_k(0.05))
    params = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=1)
    program = compiled_as_by_default(step.lower(params, state))
    assert program.memory_analysis().alias_size_in_bytes == bytes_of(state)
    # Not its coupling, of 64 rows, which the oldest XLA copies as it overwrites one.
    blocks = jax.tree.leaves((state.factor.factor, state.gram))
    sizes = {leaf.size for leaf in blocks if leaf.size > 128**2}
    assert len(sizes) > 1
    entry = program.as_text().split("ENTRY")[1]
    # XLA copies as such, and by fusions that are named after what they do.
    copies = re.findall(r"%(\S*copy\S*|\S*transpose\S*) = \w+\[([\d,]+)\]", entry)
    for name, shape in copies:
        assert math.prod(map(int, shape.split(","))) not in sizes, name


def test_no_sort_and_no_selection_over_a_whole_vector(compiled):
    program, _ = compiled
    text = program.as_text()
    for line in re.findall(r"[^\n]*(?:sort\(|custom-call\()[^\n]*", text):
        for shape in re.findall(r"\[([\d,]+)\]", line):
            axes = [int(n) for n in shape.split(",")]
            assert axes[-1] < 4096, line
    chex.assert_type(compiled[1].error, jnp.float32)

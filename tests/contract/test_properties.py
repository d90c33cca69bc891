"""Properties that hold for every tree, shape, dtype, window, density and rank."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import Structure

import efcp_jax


# Few structures, since each compiles once; hypothesis draws everything else.
STRUCTURES = [
    Structure("mfac", "dense", "mixed", 3, "float32"),
    Structure("mfac", "sparse", "vector", 6, "float32"),
    Structure("mfac", "sparse-blocks-f16", "mixed", 18, "bfloat16"),
    Structure("mfac", "rank-1", "kernel", 3, "float32"),
    Structure("mfac", "dense-bf16", "scalar", 6, "float16"),
    Structure("ggt", "dense", "matrix", 6, "float32"),
    Structure("ggt", "sparse-blocks", "mixed", 3, "float32"),
    Structure("ggt", "sparse-one", "one", 1, "float32"),
    Structure("ggt", "rank-2", "mixed", 18, "float16"),
    Structure("ggt", "rank-9", "kernel", 3, "bfloat16"),
]
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def configurations(draw):
    """Draw a structure, its hyperparameters and a history of gradients."""
    structure = draw(st.sampled_from(STRUCTURES))
    low = -10 if structure.kind == "mfac" else -6
    strength = 10.0 ** draw(st.floats(low, 3))
    b2 = draw(st.floats(0.3, 1.0))
    b1 = b2 * draw(st.floats(0.0, 0.95))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.normal(size=(reference.STEPS, reference.size(structure)))
    decades = st.integers(-6, 6)
    kinds = st.sampled_from(
        ["new", "new", "new", "same", "twice", "zero", "nan", "inf"]
    )
    for t in range(reference.STEPS):
        kind = draw(kinds)
        if kind in ("same", "twice") and t:
            rows[t] = rows[t - 1] * (1 if kind == "same" else 2)
        elif kind == "zero":
            rows[t] = 0
        elif kind in ("nan", "inf"):
            rows[t, rng.integers(rows.shape[1])] = float(kind)
        else:
            rows[t] *= 10.0 ** draw(decades)
    with np.errstate(over="ignore"):
        history = rows.astype(jnp.dtype(structure.dtype))
    return structure, np.array([strength, b1, b2]), history


@few
@given(configurations())
def test_a_run_agrees_with_float64_and_skips_faults(configuration):
    structure, values, history = configuration
    results = reference.run(structure, values[None], history[None])
    judgement = reference.judge(structure, values, history, *(r[0] for r in results))
    assert judgement.failure is None


D = 12
KINDS = {"mfac": efcp_jax.scale_by_mfac, "ggt": efcp_jax.scale_by_ggt}


@functools.cache
def runner(kind: str, compressor):
    """Return a compiled function from strength and stacked gradients to updates."""

    def run(strength, stacked):
        tx = KINDS[kind](4, strength, compressor=compressor)
        params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), stacked)

        def step(state, gradient):
            updates, state = tx.update(gradient, state)
            return state, updates

        return jax.lax.scan(step, tx.init(params), stacked)[1]

    return jax.jit(run)


def gradients(seed: int, steps: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(steps, D)).astype(np.float32)


def assert_close(value, expected, tolerance=2e-4):
    """Compare row by row, relative to the length of each expected row."""
    for one, other in zip(np.asarray(value), np.asarray(expected), strict=True):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


seeds = st.integers(0, 2**32 - 1)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize(
    "compressor", [efcp_jax.identity(), efcp_jax.top_k(0.3)], ids=["dense", "sparse"]
)
@few
@given(seeds)
def test_permuting_the_parameters_permutes_the_update(kind, compressor, seed):
    stacked = gradients(seed)
    order = np.random.default_rng(seed).permutation(D)
    run = runner(kind, compressor)
    assert_close(run(1e-2, stacked[:, order]), run(1e-2, stacked)[:, order])


@few
@given(seeds, st.integers(-20, 20))
def test_mfac_scales_inversely_with_gradients_whose_square_scales_the_damping(
    seed, exponent
):
    # (a^2 damping I + a^2 F)^-1 (a c) = u / a; exact for powers of two.
    factor = 2.0**exponent
    run = runner("mfac", efcp_jax.top_k(0.3))
    stacked = gradients(seed)
    expected = np.asarray(run(1e-2, stacked)) / np.float32(factor)
    assert_close(run(1e-2 * factor**2, stacked * np.float32(factor)), expected, 1e-4)


@few
@given(seeds, st.integers(-20, 20))
def test_ggt_does_not_change_with_gradients_that_scale_with_eps(seed, exponent):
    factor = 2.0**exponent
    run = runner("ggt", efcp_jax.top_k(0.3))
    stacked = gradients(seed)
    expected = run(1e-2, stacked)
    assert_close(run(1e-2 * factor, stacked * np.float32(factor)), expected, 1e-4)


@every_kind
@few
@given(seeds)
def test_reversing_all_signs_reverses_the_update(kind, seed):
    run, stacked = runner(kind, efcp_jax.top_k(0.3)), gradients(seed)
    assert_close(run(1e-2, -stacked), -run(1e-2, stacked))


@every_kind
@few
@given(seeds)
def test_block_top_k_with_one_block_is_global_top_k(kind, seed):
    stacked = gradients(seed)
    whole = runner(kind, efcp_jax.top_k(0.3))(1e-2, stacked)
    block = runner(kind, efcp_jax.top_k(0.3, block_size=D))(1e-2, stacked)
    np.testing.assert_array_equal(whole, block)


@every_kind
@pytest.mark.parametrize(
    "compressor", [efcp_jax.identity(), efcp_jax.top_k(0.3)], ids=["dense", "sparse"]
)
@few
@given(seeds)
def test_splitting_a_leaf_changes_nothing(kind, compressor, seed):
    stacked, run = gradients(seed), runner(kind, compressor)
    parts = run(1e-2, {"a": stacked[:, :5], "b": stacked[:, 5:].reshape(-1, 7, 1)})
    joined = np.concatenate([parts["a"], parts["b"].reshape(-1, 7)], axis=1)
    assert_close(joined, run(1e-2, stacked))


@every_kind
@few
@given(seeds, st.floats(1e-4, 1e2))
def test_the_update_is_bounded_and_points_up_the_gradient(kind, seed, strength):
    stacked = gradients(seed)
    updates = np.asarray(runner(kind, efcp_jax.identity())(strength, stacked))
    bound = np.sqrt(4 / strength) if kind == "mfac" else 1.0
    assert np.all(np.linalg.norm(updates, axis=1) <= 1.001 * bound)
    assert np.all(np.sum(updates * stacked, axis=1) > 0)

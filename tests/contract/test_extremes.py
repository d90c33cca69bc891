"""Sizes, dtypes and starts at their extremes have a stated result."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from small_runs import (
    F32,
    KINDS,
    LOSSY,
    SHAPE,
    D,
    every_kind,
    every_lossless,
    jitted,
    random,
    run,
    vectors,
)

import efcp_jax


@every_kind
@every_lossless
def test_a_window_of_one_row_is_its_closed_form(kind, name):
    gradients = random(4)
    updates, _ = run(kind, name, 1, gradients, 1e-2)
    for c, update in zip(vectors(gradients), updates, strict=True):
        square = c @ c
        expected = c / ((square if kind == "mfac" else np.sqrt(square)) + 1e-2)
        assert oracles.relative_error(update, expected) < 1e-5


@every_kind
def test_a_window_longer_than_the_run_is_a_window_of_zero_rows(kind):
    gradients = random(3)
    updates, state = run(kind, "dense", 50, gradients, 1e-2)
    rows = vectors(gradients)
    expected = (
        oracles.mfac(rows, 1e-2, 50) if kind == "mfac" else oracles.ggt(rows, 1e-2)
    )
    assert oracles.relative_error(updates[-1], expected) < 1e-5
    assert efcp_jax.diagnostics(state)["window_fill"] == np.float32(3 / 50)


def test_a_density_that_would_keep_nothing_keeps_one_entry():
    tx = efcp_jax.error_feedback(efcp_jax.top_k(1e-9))
    gradient = jnp.asarray(random(1)[0])
    updates, _ = tx.update(gradient, tx.init(gradient))
    assert np.count_nonzero(updates) == 1
    peak = np.argmax(np.abs(gradient))
    assert np.ravel(updates)[peak] == np.ravel(gradient)[peak]


@every_kind
def test_blocks_larger_than_the_model_are_one_global_block(kind):
    gradients = [jnp.asarray(g) for g in random(5)]
    results = []
    for size in (None, D, 10**9):
        tx = KINDS[kind](3, 1e-2, compressor=efcp_jax.top_k(0.3, block_size=size))
        state, update = tx.init(gradients[0]), jax.jit(tx.update)
        for gradient in gradients:
            value, state = update(gradient, state)
        results.append(np.asarray(value))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@every_kind
@pytest.mark.parametrize("shape", [(), (1, 1)])
@pytest.mark.parametrize("name", ["dense", "f16-blocks", "low_rank"])
def test_models_of_one_parameter_follow_the_scalar_formula(kind, name, shape):
    gradients = [np.full(shape, value, np.float32) for value in (2.0, -1.0, 0.5, 1.0)]
    updates, _ = run(kind, name, 2, gradients, 1e-2)
    c = [float(g.sum()) for g in gradients]
    for t, update in enumerate(updates):
        square = sum(value**2 for value in c[max(0, t - 1) : t + 1])
        bottom = square / 2 if kind == "mfac" else np.sqrt(square)
        # Two rows in one dimension are dependent.
        assert oracles.relative_error(update, c[t] / (bottom + 1e-2)) < 1e-3


def test_a_rank_above_both_sides_keeps_the_whole_gradient():
    gradient = jnp.asarray(random(1)[0])
    for rank in (3, 4, 100):
        tx = efcp_jax.error_feedback(efcp_jax.low_rank(rank))
        updates, state = tx.update(gradient, tx.init(gradient))
        np.testing.assert_array_equal(updates, gradient)
        assert not np.any(jax.tree.leaves(state.error))


@every_kind
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["dense", "low_rank"])
def test_overflow_of_a_half_precision_gradient_is_skipped(kind, name, dtype):
    init, update = jitted(kind, name, 3)
    gradient = jnp.asarray(random(1)[0], dtype)
    state = init(gradient)
    _, state = update(gradient, state, jnp.float32(1e-2))
    overflown = gradient * jnp.finfo(dtype).max * 4
    assert np.any(np.isinf(np.asarray(overflown, np.float32)))
    updates, state = update(overflown, state, jnp.float32(1e-2))
    assert state.skipped == 1
    assert not np.any(updates)
    assert updates.dtype == dtype


def test_an_update_too_large_for_float16_is_its_largest_number():
    tx = efcp_jax.scale_by_mfac(64, 1e-12)
    gradient = jnp.asarray([1e-4, -1e-4, 0.0], jnp.float16)
    updates, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_array_equal(updates, np.array([65504, -65504, 0], np.float16))


@pytest.mark.parametrize("name", LOSSY)
def test_an_error_too_large_for_its_dtype_saturates(name):
    tx = efcp_jax.error_feedback(LOSSY[name], error_dtype=jnp.float16)
    state, update = tx.init(jnp.zeros(SHAPE)), jax.jit(tx.update)
    for gradient in random(4):
        updates, state = update(jnp.asarray(gradient * 1e9), state)
        assert np.all(np.isfinite(updates))
        for leaf in jax.tree.leaves(state):
            assert np.all(np.isfinite(np.asarray(leaf, np.float32)))
    assert state.skipped == 0


@every_kind
@pytest.mark.parametrize("name", ["dense", "one", "f16-blocks", "rank-1"])
def test_denormal_and_largest_gradients_give_finite_updates(kind, name):
    one = random(1)[0]
    one = one / np.max(np.abs(one))
    for scale in (1e-45, 1e-41, 2e-38, 1e38, float(F32.max) * 0.999):
        for strength in (1e-12, 0.0):
            run(kind, name, 4, [one * np.float32(scale)] * 3, strength)


@pytest.mark.parametrize("zeros", [(0, 1, 2), (4, 5, 6, 7)])
def test_power_iteration_recovers_from_zero_gradients(zeros):
    rng = np.random.default_rng(0)
    matrix = np.outer(rng.normal(size=6), rng.normal(size=8)).astype(np.float32)
    tx = efcp_jax.error_feedback(efcp_jax.low_rank(1))
    state, update = tx.init(jnp.zeros((6, 8))), jax.jit(tx.update)
    for t in range(12):
        gradient = jnp.zeros((6, 8)) if t in zeros else jnp.asarray(matrix)
        updates, state = update(gradient, state)
        if t in zeros:
            # What is sent while nothing comes is the error, here rounding only.
            assert np.linalg.norm(updates) < 1e-4 * np.linalg.norm(matrix)
    # Rounding may have turned the basis away; it is back after a few steps, and what
    # it missed has been sent.
    assert oracles.relative_error(updates, matrix) < 1e-4
    (error,) = jax.tree.leaves(state.error)
    assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(matrix)


def test_power_iteration_that_meets_an_orthogonal_gradient_comes_back():
    row = jnp.eye(6, 8)[0]
    first, second = jnp.outer(jnp.ones(6), row), jnp.outer(jnp.ones(6), row[::-1])
    tx = efcp_jax.error_feedback(efcp_jax.low_rank(1))
    state, update = tx.init(first), jax.jit(tx.update)
    for gradient in [first] * 3 + [second] * 8:
        updates, state = update(gradient, state)
    total = np.sum(np.asarray(second)) * 8
    assert np.linalg.norm(jax.tree.leaves(state.error)[0]) < 0.1 * total
    assert oracles.relative_error(updates, second) < 1e-3

"""Nothing is lost, only delayed."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import efcp_jax


STEPS = 12


@functools.cache
def feedback_inside(name):
    return efcp_jax.scale_by_mfac(STEPS, compressor=cases.COMPRESSORS[name])


@functools.cache
def feedback_alone(name):
    return efcp_jax.error_feedback(cases.COMPRESSORS[name])


def padded(vectors, like):
    """Return flat vectors in the shape of the blocks `like`."""
    array = np.zeros((len(vectors), like[0].size), like.dtype)
    array[:, : cases.SIZE] = vectors
    return array.reshape(like.shape)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(
    "name",
    [
        "top_k",
        "top_k-blocks",
        "top_k-blocks-bf16",
        "top_k-blocks-int8",
        "top_k-blocks-f8",
    ],
)
def test_row_and_error_add_up_bitwise(name, magnitude):
    stacked = cases.gradients(STEPS)
    stacked = jax.tree.map(lambda g: g * jnp.float32(magnitude), stacked)
    states = cases.run(feedback_inside(name), stacked, cases.params())[1]
    states = jax.device_get(states)
    errors, window = states.error, cases.at(states, STEPS - 1).window
    space = cases.bound(name)
    gradients = padded(cases.vectors(stacked, np.float32), errors)
    before = np.concatenate([np.zeros_like(errors[:1]), errors[:-1]])
    for t in range(STEPS):
        row = cases.stored_row(space, window.rows, t)
        emitted = np.asarray(space.expand(row)) * window.scale[t]
        # In float32: the sums are those that the step makes, bit for bit.
        total = before[t] + gradients[t]
        assert total.dtype == emitted.dtype == np.float32
        np.testing.assert_array_equal(emitted + errors[t], total)


@pytest.mark.parametrize("name", cases.TOP_K)
def test_errors_equal_the_textbook_bitwise(name):
    result = cases.compressed_run("mfac", name)
    _, errors = oracles.with_feedback(
        cases.oracle_compressor(name), [g.astype(np.float32) for g in result.gradients]
    )
    states = result.states.error
    np.testing.assert_array_equal(padded(errors, states), states)


def test_rounding_of_stored_values_is_part_of_the_error():
    result = cases.compressed_run("mfac", "identity-bf16")
    _, errors = oracles.with_feedback(
        cases.oracle_compressor("identity-bf16"),
        [g.astype(np.float32) for g in result.gradients],
    )
    np.testing.assert_array_equal(
        padded(errors, result.states.error), result.states.error
    )
    assert result.states.error.any()


@pytest.mark.parametrize("name", ["low_rank", "low_rank-bf16"])
def test_low_rank_rows_and_errors_add_up(name):
    result = cases.compressed_run("mfac", name)
    error, space = np.zeros(cases.SIZE), cases.bound(name)
    for t, (row, gradient) in enumerate(
        zip(result.rows, result.gradients, strict=True)
    ):
        left = space.unpack(cases.at(result.states.error, t))
        after = oracles.flat(jax.tree.leaves(left))
        assert oracles.relative_error(row + after, error + gradient) <= 1e-6
        error = after


def test_a_lossless_compressor_needs_no_error():
    assert cases.compressed_run("mfac", "identity").states.error is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["identity-bf16", "top_k-blocks", "low_rank"])
def test_gradients_that_are_not_finite_leave_no_trace(name, bad):
    poisoned = jax.tree.map(np.array, cases.gradients(3))
    poisoned["kernel"][1, 0, 1, 2] = bad
    poisoned = jax.tree.map(jnp.asarray, poisoned)
    # The same without the poisoned one, and another one behind.
    clean = jax.tree.map(lambda leaf: leaf[jnp.array([0, 2, 0])], poisoned)
    tx = feedback_alone(name)
    updates, states = cases.run(tx, poisoned, cases.params())
    expected, expected_states = cases.run(tx, clean, cases.params())
    assert not oracles.flat(jax.tree.leaves(cases.at(updates, 1))).any()
    jax.tree.map(
        np.testing.assert_array_equal, cases.at(updates, 2), cases.at(expected, 1)
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        cases.at(states, 2).error,
        cases.at(expected_states, 1).error,
    )
    np.testing.assert_array_equal(states.skipped, [0, 1, 1])
    np.testing.assert_array_equal(states.count, [1, 2, 3])

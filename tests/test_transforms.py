"""The preconditioned update against d x d matrices, for every compressor."""

import cases
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import efcp_jax


M = cases.WINDOW

# Where the window stands when the update is looked at: so many steps have been made.
STAGES = {
    "empty": [1],
    "partly-filled": [2, M - 1],
    "exactly-full": [M],
    "wrapped-once": [M + 1, 2 * M],
    "wrapped-many-times": [3 * M + 1, cases.STEPS],
}

every_method = pytest.mark.parametrize("method", cases.METHODS)
every_compressor = pytest.mark.parametrize("name", cases.COMPRESSORS)
every_representation = pytest.mark.parametrize("name", cases.REPRESENTATIONS)
every_stage = pytest.mark.parametrize("stage", STAGES)


def check_update(method, name, stage, dtype, tolerance):
    result = cases.compressed_run(method, name, dtype)
    for count in STAGES[stage]:
        expected = np.concatenate(
            [
                cases.oracle(
                    method,
                    [row[part] for row in result.rows[:count]],
                    **cases.METHODS[method],
                )
                for part in cases.parts(name)
            ]
        )
        update = result.updates[count - 1]
        assert oracles.relative_error(update, expected) <= tolerance


@every_stage
@every_compressor
@every_method
def test_update_equals_the_textbook_in_float32(method, name, stage):
    tolerance = 1e-5
    if method != "mfac" and name == "low_rank-per-leaf":
        # Five rows of a leaf of one entry depend on each other. Combinations of them
        # that vanish leave rounding errors, divided by the smallest singular value
        # that GGT tells apart.
        unit = np.finfo(np.float32).eps
        tolerance = 0.5 * unit / np.sqrt(unit)
    check_update(method, name, stage, jnp.float32, tolerance)


@pytest.mark.slow
@every_stage
@every_representation
@every_method
def test_update_equals_the_textbook_in_float64(method, name, stage, x64):
    check_update(method, name, stage, jnp.float64, 1e-11)


@pytest.mark.parametrize("name", ["top_k-all", "low_rank-all"])
@every_method
def test_keeping_everything_equals_dense(method, name):
    updates = cases.compressed_run(method, name).updates
    dense = cases.compressed_run(method, "identity").updates
    for update, expected in zip(updates, dense, strict=True):
        assert oracles.relative_error(update, expected) <= 1e-5


def test_low_rank_of_matrices_of_that_rank_equals_dense():
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(9, 8, 2)), rng.normal(size=(2, 6))
    stacked, model = jnp.asarray(left @ right, jnp.float32), jnp.zeros((8, 6))
    updates = {}
    for name in ("identity", "low_rank"):
        tx = efcp_jax.scale_by_mfac(4, 0.1, compressor=cases.COMPRESSORS[name])
        updates[name] = cases.vectors(cases.run(tx, stacked, model)[0])
    for update, dense in zip(updates["low_rank"], updates["identity"], strict=True):
        assert oracles.relative_error(update, dense) <= 1e-5


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("mfac", "top_k"),
        ("ggt", "top_k-blocks"),
        ("mfac", "top_k-blocks-bf16"),
        ("mfac", "low_rank"),
        ("ggt", "low_rank-per-leaf"),
    ],
)
def test_feedback_in_a_chain_equals_feedback_inside(method, name):
    compressor = cases.COMPRESSORS[name]
    behind = cases.transform(
        method,
        window_size=M,
        compressor=compressor,
        error_feedback=False,
        **cases.METHODS[method],
    )
    chain = optax.chain(efcp_jax.error_feedback(compressor), behind)
    updates, _ = cases.run(chain, cases.gradients(cases.STEPS), cases.params())
    expected = cases.compressed_run(method, name).updates
    for update, inside in zip(cases.vectors(updates), expected, strict=True):
        assert oracles.relative_error(update, inside) <= 1e-5


@pytest.mark.parametrize("name", ["top_k", "top_k-blocks-bf16"])
def test_error_feedback_alone_emits_the_compressed_gradients(name):
    stacked = cases.gradients(9)
    tx = efcp_jax.error_feedback(cases.COMPRESSORS[name])
    updates, states = cases.run(tx, stacked, cases.params())
    rows, errors = oracles.with_feedback(
        cases.oracle_compressor(name), cases.vectors(stacked, np.float32)
    )
    np.testing.assert_array_equal(cases.vectors(updates), rows)
    kept = np.asarray(states.error).reshape(9, -1)
    np.testing.assert_array_equal(kept[:, : cases.SIZE], errors)
    assert not kept[:, cases.SIZE :].any()


def test_divisor_filled_averages_over_the_rows_there_are():
    tx = efcp_jax.scale_by_mfac(M, 0.1, divisor="filled")
    stacked = cases.gradients(2 * M)
    updates, _ = cases.run(tx, stacked, cases.params())
    rows = cases.vectors(stacked)
    for count, update in enumerate(cases.vectors(updates), start=1):
        window = rows[max(0, count - M) : count]
        expected = oracles.mfac(window, 0.1, divisor=len(window))
        assert oracles.relative_error(update, expected) <= 1e-5


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("method", ["mfac", "ggt"])
def test_any_window_size_works(method, size):
    given = cases.METHODS[method]
    tx = cases.transform(method, window_size=size, **given)
    stacked = cases.gradients(7)
    updates, _ = cases.run(tx, stacked, cases.params())
    expected = cases.oracle(method, cases.vectors(stacked), size, **given)
    assert oracles.relative_error(cases.vectors(updates)[-1], expected) <= 1e-5


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-8])
def test_ggt_keeps_its_accuracy_for_small_eps(eps):
    expected_error = 1e-5
    tx = efcp_jax.scale_by_ggt(16, eps)
    stacked = jnp.asarray(np.random.default_rng(2).normal(size=(40, 500)), jnp.float32)
    updates, _ = cases.run(tx, stacked, jnp.zeros(500))
    expected = oracles.ggt(cases.vectors(stacked)[-16:], eps)
    update = cases.vectors(updates)[-1]
    assert oracles.relative_error(update, expected) <= expected_error


@pytest.mark.slow
def test_mfac_is_accurate_where_the_published_form_is_not():
    # The published ImageNet setting: rows of length 1, damping 1e-7, a large window.
    # Like gradients, the rows have a mean in common, here as long as their noise.
    size, d, damping = 256, 50_000, 1e-7
    key = jax.random.key(3)

    @jax.jit
    def gradient(step):
        row = jax.random.normal(jax.random.fold_in(key, step), (d,))
        row = row + jax.random.normal(key, (d,))
        return row / jnp.linalg.norm(row)

    @jax.jit
    def last_update():
        tx = efcp_jax.scale_by_mfac(size, damping)

        def step(state, t):
            return tx.update(gradient(t), state)[1], None

        state, _ = lax.scan(step, tx.init(jnp.zeros(d)), jnp.arange(size - 1))
        return tx.update(gradient(jnp.asarray(size - 1)), state)[0]

    update = last_update()
    rows = np.array([gradient(jnp.asarray(t)) for t in range(size)])
    # In float64 the published form loses the same digits, but of sixteen.
    expected = oracles.published_mfac(rows, damping, np.float64)
    assert oracles.relative_error(update, expected) <= 1e-4
    published = oracles.published_mfac(rows, damping, np.float32)
    assert oracles.relative_error(published, expected) > 1e-2

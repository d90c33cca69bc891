"""Nothing drifts and nothing overflows however long a run is."""

import functools

import cases
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import efcp_jax
from efcp_jax.devices.placement import layout


M = 6
STEPS = 20_000
COMPRESSORS = {
    "dense": efcp_jax.identity(),
    "sparse": efcp_jax.top_k(0.2, block_size=16),
    "low_rank": efcp_jax.low_rank(1),
}


def stored_rows(name: str, state) -> np.ndarray:
    """Return the stored rows as float64 vectors, shape `(m, d)`."""
    rows = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.window.rows)
    space = COMPRESSORS[name].bind(layout(cases.params(), jnp.float32, None))
    if name == "sparse":
        tiles, entries, lanes = rows.values.shape
        dense = np.zeros((M, tiles, 16, lanes))
        for t, n, lane in np.ndindex(tiles, entries, lanes):
            place = n // (entries // M), t, int(rows.offsets[t, n, lane]), lane
            dense[place] += rows.values[t, n, lane]
        return dense.reshape(M, -1)
    leaves = cases.dense_rows(space, rows, M)
    return np.concatenate([leaf.reshape(M, -1) for leaf in leaves], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_gram_matrix_does_not_drift_in_twenty_thousand_steps(name):
    tx = efcp_jax.scale_by_mfac(M, compressor=COMPRESSORS[name])
    params = cases.params()

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state):
        def step(state, t):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), t), 4)
            gradient = {
                key: jax.random.normal(k, leaf.shape)
                for k, (key, leaf) in zip(keys, params.items(), strict=True)
            }
            # A slow change of scale over six decades and back.
            factor = 10.0 ** (3 * jnp.sin(t / 500.0))
            gradient = jax.tree.map(lambda g: g * factor, gradient)
            updates, state = tx.update(gradient, state)
            return state, sum(jnp.sum(jnp.abs(u)) for u in jax.tree.leaves(updates))

        return lax.scan(step, state, jnp.arange(STEPS))

    state, sizes = run(tx.init(params))
    assert np.all(np.isfinite(sizes))
    assert state.count == STEPS
    assert state.skipped == 0
    rows = stored_rows(name, state)
    lengths = np.linalg.norm(rows, axis=1)
    drift = np.abs(np.asarray(state.gram) - rows @ rows.T) / np.outer(lengths, lengths)
    # The rounding of one inner product, not of twenty thousand.
    assert np.max(drift) < 16 * np.finfo(np.float32).eps


@pytest.mark.parametrize("kind", [efcp_jax.scale_by_mfac, efcp_jax.scale_by_ggt])
def test_counters_at_the_largest_integer_do_not_stop_the_ring(kind):
    largest = jnp.asarray(np.iinfo(np.int32).max, jnp.int32)
    tx = kind(3, 1e-2)
    update = jax.jit(tx.update)
    fresh = tx.init(jnp.zeros(5))
    old = fresh._replace(count=largest, skipped=largest)
    rng = np.random.default_rng(0)
    for _ in range(8):
        gradient = jnp.asarray(rng.normal(size=5), jnp.float32)
        expected, fresh = update(gradient, fresh)
        updates, old = update(gradient, old)
        np.testing.assert_array_equal(updates, expected)
    _, old = update(jnp.full(5, jnp.nan), old)
    assert old.count == largest
    assert old.skipped == largest
    np.testing.assert_array_equal(old.window.slot, fresh.window.slot)
    assert oracles.relative_error(old.gram, fresh.gram) == 0


def test_the_error_of_a_constant_gradient_stays_bounded():
    tx = efcp_jax.error_feedback(efcp_jax.top_k(0.1))
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=40), jnp.float32)

    def step(state, _):
        updates, state = tx.update(gradient, state)
        return state, updates

    run = jax.jit(lambda state: lax.scan(step, state, None, length=STEPS))
    state, updates = run(tx.init(gradient))
    # Every entry is sent at the latest when its sum passes all others: 10 rounds of 4.
    assert np.max(np.abs(state.error)) < 40 * np.max(np.abs(gradient))
    sent = np.sum(np.asarray(updates, np.float64), axis=0)
    total = STEPS * np.asarray(gradient, np.float64)
    np.testing.assert_allclose(sent + np.ravel(state.error), total, rtol=1e-4)

"""The factorisation that is kept from step to step, against NumPy in float64."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import efcp_jax
from efcp_jax.preconditioners import mfac_coefficients, system as systems


EPS = float(np.finfo(np.float32).eps)
# Runs do not divide the slots, so the last one begins early.
SIZE = systems._SMALLEST + 18
RUN = systems._RUN
DIMENSION = 2 * SIZE


@jax.jit
def step(gram, slot, damping, divisor, kept):
    ones = jnp.ones(gram.shape[0], gram.dtype)
    return mfac_coefficients(gram, ones, slot, damping, divisor, kept)


def rows_of(rng):
    return rng.standard_normal((SIZE, DIMENSION)) / np.sqrt(DIMENSION)


def insert(rows, gram, slot, row):
    rows[slot] = row
    gram[slot] = gram[:, slot] = rows @ row


def error(result, gram, slot, damping, divisor):
    exact = np.linalg.inv(damping * np.eye(len(gram)) + gram / divisor)[slot]
    return np.linalg.norm(np.asarray(result) - exact) / np.linalg.norm(exact)


def start(dtype=jnp.float32):
    return systems.empty(SIZE, dtype)


@pytest.mark.parametrize("first", [0, RUN - 3, SIZE - RUN - 2, SIZE - 3])
def test_every_step_solves_the_system(first):
    """Across the ends of runs, and from the last slot to the first."""
    rng = np.random.default_rng(first)
    rows = rows_of(rng)
    gram, kept = rows @ rows.T, start()
    damping = 1e-3
    for i in range(6):
        slot = (first + i) % SIZE
        insert(rows, gram, slot, rng.standard_normal(DIMENSION) / 30)
        result, kept = step(gram.astype(np.float32), slot, damping, SIZE, kept)
        condition = np.linalg.cond(damping * np.eye(SIZE) + gram / SIZE)
        assert error(result, gram, slot, damping, SIZE) <= 10 * condition * EPS


@pytest.mark.slow
def test_nothing_drifts_over_two_rounds_of_the_window():
    rng = np.random.default_rng(1)
    rows = rows_of(rng).astype(np.float32)
    news = rng.standard_normal((2 * SIZE, DIMENSION)).astype(np.float32) / 30

    @jax.jit
    def run(rows, news):
        def one(carry, given):
            rows, kept = carry
            slot, row = given
            rows = rows.at[slot].set(row)
            gram = jnp.matmul(rows, rows.T, precision="highest")
            result, kept = step(gram, slot, 1e-3, SIZE, kept)
            return (rows, kept), result[slot]

        slots = jnp.arange(len(news)) % SIZE
        return lax.scan(one, (rows, start()), (slots, news))

    (rows, kept), _ = run(rows, news)
    slot = 5
    gram = np.asarray(rows, np.float64) @ np.asarray(rows, np.float64).T
    kept_result, _ = step(gram.astype(np.float32), slot, 1e-3, SIZE, kept)
    fresh_result, _ = step(gram.astype(np.float32), slot, 1e-3, SIZE, None)
    kept_error, fresh_error = (
        error(result, gram, slot, 1e-3, SIZE) for result in (kept_result, fresh_result)
    )
    assert kept_error <= 2 * fresh_error + EPS


def test_factor_is_made_once_a_run_and_when_the_numbers_change():
    rng = np.random.default_rng(2)
    rows = rows_of(rng)
    gram, kept = rows @ rows.T, start()
    # A factor of another matrix shows whether it was made anew.
    spoil = lambda kept: kept._replace(factor=jax.tree.map(jnp.ones_like, kept.factor))
    renewed = []
    for slot, damping, divisor in [
        (0, 1e-2, SIZE),
        (1, 1e-2, SIZE),
        (RUN - 1, 1e-2, SIZE),
        (RUN, 1e-2, SIZE),
        (RUN, 1e-1, SIZE),
        (RUN, 1e-1, SIZE - 1),
        (RUN + 1, 1e-1, SIZE - 1),
    ]:
        _, kept = step(gram.astype(np.float32), slot, damping, divisor, kept)
        spoilt = spoil(kept)
        _, after = step(gram.astype(np.float32), slot, damping, divisor, spoilt)
        assert float(after.factor.below[0, 0]) == 1  # kept: the same run and numbers
        _, after = step(gram.astype(np.float32), slot, damping, divisor, kept)
        renewed.append(int(after.run))
    assert renewed == [0, 0, 0, RUN, RUN, RUN, RUN]
    for change in ((2 * RUN, 1e-1, SIZE - 1), (RUN, 1e-3, SIZE - 1), (RUN, 1e-1, 7)):
        _, after = step(gram.astype(np.float32), *change, spoil(kept))
        assert float(after.factor.below[0, 0]) != 1


def test_result_does_not_depend_on_when_the_factor_was_made():
    """A step that is skipped factorises with the old row; bits must not tell."""
    rng = np.random.default_rng(3)
    rows = rows_of(rng)
    gram = rows @ rows.T
    _, skipped = step(gram.astype(np.float32), 0, 1e-3, SIZE, start())
    insert(rows, gram, 0, rng.standard_normal(DIMENSION) / 30)
    for a, b in zip(
        jax.tree.leaves(step(gram.astype(np.float32), 0, 1e-3, SIZE, skipped)),
        jax.tree.leaves(step(gram.astype(np.float32), 0, 1e-3, SIZE, start())),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("damping", [0.0, 1e-12])
@pytest.mark.parametrize("equal", [(3, 5), (3, SIZE - 1), (SIZE - 2, SIZE - 1)])
def test_dependent_rows_inside_and_outside_of_the_run(equal, damping):
    rng = np.random.default_rng(4)
    rows = rows_of(rng)
    rows[equal[0]] = rows[equal[1]]
    gram = (rows @ rows.T).astype(np.float32)
    for slot in (3, 400, SIZE - 1):
        _, kept = step(gram, (slot + 1) % SIZE, damping, SIZE, start())
        result, _ = step(gram, slot, damping, SIZE, kept)
        expected, _ = step(gram, slot, damping, SIZE, None)
        assert np.all(np.isfinite(result))
        update, wanted = rows.T @ np.asarray(result), rows.T @ np.asarray(expected)
        assert np.linalg.norm(update - wanted) <= 1e-3 * np.linalg.norm(wanted)


def test_a_window_that_fills_has_empty_slots():
    rng = np.random.default_rng(5)
    rows, kept = np.zeros((SIZE, DIMENSION)), start()
    gram = rows @ rows.T
    for slot in range(4):
        insert(rows, gram, slot, rng.standard_normal(DIMENSION) / 30)
        result, kept = step(gram.astype(np.float32), slot, 1e-2, slot + 1, kept)
        assert error(result, gram, slot, 1e-2, slot + 1) <= 1e-5


def test_damping_that_is_not_a_number_ends():
    gram = np.eye(SIZE, dtype=np.float32)
    result, _ = step(gram, 0, np.nan, SIZE, start())
    assert result.shape == (SIZE,)


def test_doubles_stay_doubles():
    with jax.enable_x64(True):
        rng = np.random.default_rng(6)
        rows = rows_of(rng)
        gram, kept = rows @ rows.T, start(dtype=jnp.float64)
        for slot in (0, 1):
            result, kept = step(gram, slot, 1e-3, SIZE, kept)
            assert result.dtype == jnp.float64
            assert error(result, gram, slot, 1e-3, SIZE) <= 1e-11


@pytest.mark.slow
def test_batches_keep_a_factor_each():
    rng = np.random.default_rng(7)
    grams = []
    for _ in range(2):
        rows = rows_of(rng)
        grams.append((rows @ rows.T).astype(np.float32))
    kept = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), start())
    together = jax.jit(jax.vmap(lambda g, j, k: step(g, j, 1e-3, SIZE, k)))
    for slots in (jnp.asarray([0, RUN - 1]), jnp.asarray([1, RUN])):
        results, kept = together(jnp.stack(grams), slots, kept)
        for gram, slot, result in zip(grams, slots, results, strict=True):
            alone, _ = step(gram, slot, 1e-3, SIZE, start())
            np.testing.assert_allclose(result, alone, rtol=1e-3, atol=1e-3)


def test_accelerators_factorise_every_time(request):
    gram = np.eye(SIZE, dtype=np.float32)
    _, kept = step(gram, 0, 1e-3, SIZE, start())
    assert int(kept.run) == 0
    taken = request.getfixturevalue("accelerator")
    jax.clear_caches()
    result, kept = jax.jit(lambda *given: step.__wrapped__(*given))(
        gram, 0, 1e-3, SIZE, kept
    )
    jax.clear_caches()
    assert ["cpu"] in taken
    # What a CPU takes up later is not the factor of a window long gone.
    assert int(kept.run) == -1
    assert error(result, np.eye(SIZE), 0, 1e-3, SIZE) <= 1e-5


def test_small_windows_keep_nothing():
    params = jnp.zeros(3)
    size = systems._SMALLEST
    assert efcp_jax.scale_by_mfac(size - 1).init(params).factor is None
    assert efcp_jax.scale_by_ggt(size).init(params).factor is None
    kept = efcp_jax.scale_by_mfac(size).init(params).factor
    held = sum(leaf.size for leaf in jax.tree.leaves(kept))
    assert held <= 0.8 * size**2


@pytest.mark.parametrize("block_diagonal", [False, True])
def test_optimizers_keep_a_factor_for_every_matrix(block_diagonal):
    """Steps with what is kept are those of steps that keep nothing."""
    size, steps = systems._SMALLEST, 70
    # With feedback, rows of rank 1 go apart from the last bit on, whatever is kept.
    tx = efcp_jax.scale_by_mfac(
        size,
        1e-2,
        compressor=efcp_jax.low_rank(1),
        block_diagonal=block_diagonal,
        error_feedback=False,
    )
    params = {"a": jnp.zeros((6, 4)), "b": jnp.zeros(5)}
    rng = np.random.default_rng(8)
    stacked = jax.tree.map(
        lambda p: rng.standard_normal((steps, *p.shape)).astype(np.float32), params
    )

    # One program for both, so that they see the same rows to the last bit.
    @jax.jit
    def run(forgetful):
        def one(state, gradient):
            forget = lambda leaf: jnp.where(forgetful, -1, leaf).astype(leaf.dtype)
            state = state._replace(factor=jax.tree.map(forget, state.factor))
            update, state = tx.update(gradient, state, params)
            return state, update

        return lax.scan(one, tx.init(params), stacked)

    (state, kept), (_, forgotten) = run(False), run(True)
    shapes = [gram.shape[:-2] for gram in jax.tree.leaves(state.gram)]
    assert shapes == ([(1,), (1,)] if block_diagonal else [()])
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(forgotten), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@pytest.mark.slow
def test_devices_keep_the_factor_of_one_device():
    size, steps = systems._SMALLEST, 4
    rng = np.random.default_rng(9)
    gradients = rng.standard_normal((steps, 64)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    replicated = jax.NamedSharding(mesh, jax.P())
    found = {}
    for name, place in {
        "one": lambda x: x,
        "many": lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("x"))),
    }.items():
        params = place(jnp.zeros(64))
        # Of all entries, since blocks of a shard are not those of the whole.
        blocks = efcp_jax.top_k(1.0, block_size=8)
        tx = efcp_jax.scale_by_mfac(size, 1e-2, compressor=blocks)
        state, update = tx.init(params), jax.jit(tx.update)
        updates = []
        for gradient in gradients:
            result, state = update(place(jnp.asarray(gradient)), state, params)
            updates.append(np.asarray(result))
        found[name] = np.stack(updates)
        if name == "many":
            for leaf in jax.tree.leaves(state.factor):
                assert leaf.sharding.is_equivalent_to(replicated, leaf.ndim)
            shardings = efcp_jax.sharding.state_shardings(tx, params)
            assert jax.tree.structure(shardings) == jax.tree.structure(state)
            moved = efcp_jax.sharding.reshard_state(state, (tx, params), (tx, params))
            for a, b in zip(*map(jax.tree.leaves, (moved, state)), strict=True):
                np.testing.assert_array_equal(a, b)
        assert int(state.factor.run) == 0
    np.testing.assert_allclose(found["one"], found["many"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dependent", [False, True])
def test_libraries_of_gpus_are_given_the_whole_matrix(dependent, monkeypatch):
    """The branches a GPU takes, run here, give the coefficients of a CPU."""
    rng = np.random.default_rng(10)
    rows = rows_of(rng)
    if dependent:
        rows[3] = rows[5]
    gram, taken = (rows @ rows.T).astype(np.float32), []
    run = lambda: jax.jit(
        lambda gram: mfac_coefficients(gram, jnp.ones(SIZE), 3, 1e-9, SIZE)[0]
    )(gram)
    here = run()

    def choose(*operands, default, **platforms):
        taken.append(sorted(platforms))
        return platforms.get("cuda", default)(*operands)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    jax.clear_caches()
    there = run()
    jax.clear_caches()
    assert ["cuda", "rocm"] in taken
    update, wanted = rows.T @ np.asarray(there), rows.T @ np.asarray(here)
    assert np.linalg.norm(update - wanted) <= 1e-3 * np.linalg.norm(wanted)

"""What the six optimizers put around the preconditioned update."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import efcp_jax


M = 4
STEPS = 7
SPARSE = {"density": 0.2, **cases.WIDE}
LOW_RANK = {"rank": 2}
# The names that an optimizer adds, and the compressor that they stand for.
OPTIMIZERS = {
    "mfac": ({}, efcp_jax.identity()),
    "sparse_mfac": (SPARSE, efcp_jax.top_k(0.2, block_size=4096)),
    "low_rank_mfac": (LOW_RANK, efcp_jax.low_rank(2)),
    "ggt": ({}, efcp_jax.identity()),
    "sparse_ggt": (SPARSE, efcp_jax.top_k(0.2, block_size=4096)),
    "low_rank_ggt": (LOW_RANK, efcp_jax.low_rank(2)),
}
MASK = {"bias": False, "gain": False, "kernel": True, "weight": True}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def optimizer(name, learning_rate=1.0, **given):
    factory = getattr(efcp_jax, name)
    return factory(learning_rate, window_size=M, **OPTIMIZERS[name][0], **given)


def hyperparameters(name):
    """Return values of the preconditioner that are not the defaults."""
    if "mfac" in name:
        return {"damping": 0.3, "divisor": "filled"}
    return {"eps": 0.1, "b1": 0.5, "b2": 0.9}


def model():
    """Return parameters that are not zero, so that they can decay."""
    return jax.tree.map(lambda leaf: leaf + 2.0, cases.params())


@functools.cache
def directions(name):
    """Return the updates of the transform that the optimizer is built on."""
    kind = name.split("_")[-1]
    given = hyperparameters(name)
    tx = cases.transform(kind, window_size=M, compressor=OPTIMIZERS[name][1], **given)
    return updates_of(tx)


def updates_of(tx):
    return cases.vectors(cases.run(tx, cases.gradients(STEPS), model())[0])


def check_close(updates, expected, tolerance):
    for update, value in zip(updates, expected, strict=True):
        assert oracles.relative_error(update, value) <= tolerance


@every_optimizer
def test_optimizer_adds_momentum_decay_and_rate_and_compiles_once(name):
    tx = optimizer(
        name,
        0.25,
        momentum=0.9,
        weight_decay=0.1,
        mask=MASK,
        **hyperparameters(name),
    )
    params, stacked = model(), cases.gradients(STEPS)
    chex.clear_trace_counter()

    # Another program than the scan that made the directions.
    @functools.partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(1)
    def step(gradient, state):
        return tx.update(gradient, state, params)

    decayed = [np.full(cases.SHAPES[k], 2.0 * MASK[k]) for k in sorted(cases.SHAPES)]
    trace, state = 0.0, jax.jit(tx.init)(params)
    for t, direction in enumerate(directions(name)):
        update, state = step(cases.at(stacked, t), state)
        # Momentum on the update, decay decoupled and times the learning rate.
        trace = direction + 0.9 * trace
        expected = -0.25 * (trace + 0.1 * oracles.flat(decayed))
        update = oracles.flat(jax.tree.leaves(update))
        assert oracles.relative_error(update, expected) <= 1e-5


@pytest.mark.parametrize("name", ["ggt"])
def test_momentum_is_the_trace_of_optax(name):
    given = hyperparameters(name)
    chain = optax.chain(optimizer(name, **given), optax.trace(0.9))
    inside = optimizer(name, momentum=0.9, **given)
    check_close(updates_of(inside), updates_of(chain), 1e-6)


def test_rate_momentum_and_decay_may_be_schedules():
    rate = optax.linear_schedule(1.0, 0.1, STEPS)
    momentum = optax.linear_schedule(0.9, 0.5, STEPS)
    decay = optax.linear_schedule(0.0, 0.2, STEPS)
    tx = optimizer(
        "ggt",
        rate,
        momentum=momentum,
        weight_decay=decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 0, params),
        **hyperparameters("ggt"),
    )
    masked = [np.full(s, 2.0 * (len(s) > 0)) for _, s in sorted(cases.SHAPES.items())]
    trace = 0.0
    for t, (update, direction) in enumerate(
        zip(updates_of(tx), directions("ggt"), strict=True)
    ):
        trace = direction + float(momentum(t)) * trace
        decayed = float(decay(t)) * oracles.flat(masked)
        expected = -float(rate(t)) * (trace + decayed)
        assert oracles.relative_error(update, expected) <= 1e-5


@pytest.mark.parametrize("name", ["mfac", "ggt"])
def test_damping_and_eps_may_be_schedules(name):
    schedule = optax.exponential_decay(1.0, 1, 0.5)
    field = {"mfac": "damping", "ggt": "eps"}[name]
    updates = updates_of(optimizer(name, **{field: schedule}))
    rows = cases.vectors(cases.gradients(STEPS))
    for t, update in enumerate(updates):
        given = {field: float(schedule(t))}
        expected = -cases.oracle(name, rows[: t + 1], M, **given)
        assert oracles.relative_error(update, expected) <= 1e-5


@pytest.mark.parametrize("name", ["sparse_mfac"])
def test_plain_calls_equal_compiled_ones(name):
    tx, params = optimizer(name, -1.0, **hyperparameters(name)), model()
    state, stacked = tx.init(params), cases.gradients(STEPS)
    for t in range(2):
        update, state = tx.update(cases.at(stacked, t), state, params)
        update = oracles.flat(jax.tree.leaves(update))
        assert oracles.relative_error(update, directions(name)[t]) <= 1e-5


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("sparse_mfac", jax.vmap),
        ("sparse_mfac", jax.pmap),
        ("low_rank_mfac", jax.vmap),
        ("ggt", jax.vmap),
    ],
)
def test_vmap_and_pmap_give_every_member_its_own_run(name, batch):
    tx = optimizer(name, **hyperparameters(name))
    members = [cases.gradients(STEPS, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    params = model()
    run = lambda gradients: cases.scan(tx, gradients, params)[0]
    batched = batch(run)(stacked) if batch is jax.pmap else jax.jit(batch(run))(stacked)
    first, second = (cases.vectors(cases.at(batched, i)) for i in range(2))
    check_close(first, [-u for u in directions(name)], 1e-5)
    for update, other in zip(second, first, strict=True):
        assert oracles.relative_error(update, other) > 0.1


@pytest.mark.parametrize("name", ["sparse_mfac", "low_rank_ggt"])
def test_bf16_gradients_are_worked_on_in_float32(name):
    tx = optimizer(name, **hyperparameters(name))
    narrow = cases.gradients(STEPS, jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    updates, states = cases.run(tx, narrow, cases.params(jnp.bfloat16))
    expected, expected_states = cases.run(tx, wide, cases.params())
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
    chex.assert_trees_all_equal_dtypes(states, expected_states)
    # One rounding of each entry, to 8 bits.
    for update, value in zip(
        cases.vectors(updates), cases.vectors(expected), strict=True
    ):
        np.testing.assert_allclose(update, value, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", ["mfac", "sparse_ggt", "low_rank_mfac"])
def test_complex_leaves_are_pairs_of_reals(name):
    rng = np.random.default_rng(3)
    real, imag = rng.normal(size=(2, STEPS, 6, 5)).astype(np.float32)
    pairs = jnp.concatenate([jnp.asarray(real), jnp.asarray(imag)], axis=-1)
    tx = optimizer(name, metric=None)  # a metric has one moment for both parts
    updates, _ = cases.run(
        tx, jnp.asarray(real + 1j * imag), jnp.zeros((6, 5), jnp.complex64)
    )
    expected, _ = cases.run(tx, pairs, jnp.zeros((6, 10)))
    assert updates.dtype == jnp.complex64
    check_close(cases.vectors(updates), cases.vectors(expected), 1e-5)


@pytest.mark.parametrize("name", ["sparse_mfac", "sparse_ggt"])
def test_rows_and_errors_are_half_precision_where_nothing_else_is_asked_for(name):
    half = {"value_dtype": jnp.bfloat16, "error_dtype": jnp.bfloat16}
    make, params = getattr(efcp_jax, name), cases.params()
    stored = lambda tx: [(x.shape, x.dtype) for x in jax.tree.leaves(tx.init(params))]
    assert stored(make(1.0, M)) == stored(make(1.0, M, **half))
    assert stored(make(1.0, M)) != stored(make(1.0, M, **cases.WIDE))
    default, explicit = (
        updates_of(make(1.0, M, **given, **hyperparameters(name)))
        for given in ({}, half)
    )
    check_close(default, explicit, 0)


@pytest.mark.parametrize("name", ["sparse_mfac", "sparse_ggt"])
@pytest.mark.parametrize("density", [1, np.float32(1)])
def test_density_one_is_the_dense_optimizer(name, density):
    given = hyperparameters(name)
    every = getattr(efcp_jax, name)(-1.0, M, density, **given)
    dense = getattr(efcp_jax, name.split("_")[1])(-1.0, M, **given)
    check_close(updates_of(every), updates_of(dense), 1e-5)

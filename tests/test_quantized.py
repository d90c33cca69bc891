"""Errors of 8 bits: nothing drifts, and whatever moves a state moves them."""

import functools

import cases
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import oracles
import pytest
import sharding_cases

import efcp_jax
from efcp_jax import quantized
from efcp_jax.sharding import reshard_state


INT8 = {"error_dtype": jnp.int8}
MIXED = efcp_jax.by_label(
    {"a": efcp_jax.top_k(0.25, block_size=4), "b": efcp_jax.low_rank(1)},
    {"bias": "a", "gain": "a", "kernel": "b", "weight": "b"},
)
COMPRESSORS = {
    "top_k": efcp_jax.top_k(0.1),
    "top_k-blocks": efcp_jax.top_k(0.25, block_size=16),
    "low_rank": efcp_jax.low_rank(1),
    "identity-bf16": efcp_jax.identity(value_dtype=jnp.bfloat16),
    "by_label": MIXED,
}


def drawn(shape=(6, 300), dtype=np.float32):
    """Return numbers of very different magnitudes, and a group of zeros."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 10.0 ** np.arange(-3, 3)[:, None]
    x[2, :100] = 0
    return x.astype(dtype)


def empty(x):
    return quantized.zeros(jnp.asarray(x), P(), jnp.dtype(jnp.int8))


def kept(x, count=0):
    given = jnp.asarray(x), empty(x), jnp.asarray(True), jnp.int32(count)
    stored = jax.jit(quantized.store)(*given)
    return stored, np.asarray(quantized.load(stored, x.dtype), np.float64)


def test_a_number_is_off_by_less_than_the_unit_of_its_group():
    x = drawn()
    stored, y = kept(x)
    assert stored.values.dtype == jnp.int8
    assert stored.values.shape == x.shape
    # In three groups of 100.
    for group, low in enumerate(range(0, 300, 100)):
        part = slice(low, low + 100)
        unit = np.asarray(stored.units[:, group], np.float64)
        peak = np.abs(x[:, part]).max(axis=1)
        assert np.all((peak <= 127 * unit) & ((peak > 63 * unit) | (peak == 0)))
        assert np.all(np.abs(y - x)[:, part] < unit[:, None])
    assert not y[2, :100].any()


def test_rounding_drifts_nowhere():
    x = drawn()
    steps = 4000
    many = jax.jit(jax.vmap(quantized.store, in_axes=(None, None, None, 0)))(
        jnp.asarray(x), empty(x), jnp.asarray(True), jnp.arange(steps)
    )
    values = np.asarray(many.values, np.float64)
    unit = np.repeat(np.asarray(many.units[0], np.float64), 100, axis=1)
    share = x / unit - np.floor(x / unit)
    spread = np.sqrt(share * (1 - share) / steps)
    off = np.abs(values.mean(axis=0) - x / unit)
    # The largest of 1,800 normal numbers is above five in one of a thousand draws.
    assert np.all(off <= 5 * spread + 1e-5)
    # One step does not know of the last, nor one number of the next.
    rest = (values - x / unit)[:, share > 0.01]
    scaled = rest / rest.std()
    for a, b in ((scaled[1:], scaled[:-1]), (scaled[:, 1:], scaled[:, :-1])):
        assert abs(np.mean(a * b)) <= 5 / np.sqrt(a.size)


def test_numbers_that_were_kept_stay_as_they_are():
    _, y = kept(drawn())
    for count in (1, 2, 77):
        np.testing.assert_array_equal(kept(y.astype(np.float32), count)[1], y)
    on_host = quantized.store_on_host(y.astype(np.float32), empty(y))
    np.testing.assert_array_equal(quantized.load(on_host, np.float64), y)


def test_hosts_round_to_the_nearest():
    x = drawn()
    on_host = quantized.store_on_host(x, empty(x))
    error = np.abs(np.asarray(quantized.load(on_host, np.float64)) - x)
    unit = np.repeat(np.asarray(on_host.units, np.float64), 100, axis=1)
    # Half a unit, but for the largest, of which there is no next one.
    clipped = np.abs(x) > 127 * unit
    assert np.all(error[~clipped] <= unit[~clipped] / 2)
    assert error.max() > 0


@pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-38, 1e30, 1e38])
def test_extremes_stay_finite(factor):
    x = np.float32(factor) * np.linspace(-3, 3, 40, dtype=np.float32)[None]
    _, y = kept(x)
    assert np.all(np.isfinite(y))
    assert np.all(np.abs(y) <= 2.0 * float(np.abs(x).max()))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_gradients_arrive_but_for_one_rounding_error(name):
    """What is emitted and what is kept are all gradients, plus what rounding did."""
    steps = 30
    tx = efcp_jax.error_feedback(COMPRESSORS[name], **INT8)
    held = jax.tree.leaves(tx.init(cases.params()).error)
    assert {leaf.dtype.name for leaf in held} == {"int8", "bfloat16"}
    stacked = cases.gradients(steps)
    updates, states = cases.run(tx, stacked, cases.params())
    emitted = np.sum(cases.vectors(updates), axis=0)
    given = np.sum(cases.vectors(stacked), axis=0)
    layout = efcp_jax.devices.placement.layout(cases.params(), jnp.float32, None)
    space = COMPRESSORS[name].bind(layout)
    error = quantized.load(cases.at(states.error, steps - 1), jnp.float32)
    left = oracles.flat(jax.tree.leaves(space.unpack(error)))
    held = jax.tree.leaves(states.error)
    most = float(max(jnp.max(x) for x in held if x.dtype == jnp.bfloat16))
    # Roundings are independent of each other: a random walk of steps below one unit.
    assert np.all(np.abs(emitted + left - given) <= 4 * np.sqrt(steps) * most)


def test_small_gradients_are_not_lost():
    # One entry is large and turns every step, the others are far below half a unit of
    # what remains of it. Rounded to the nearest, these would never be heard of.
    size, steps, small = 8, 4000, 1e-3
    tx = efcp_jax.error_feedback(efcp_jax.top_k(1 / size, block_size=size), **INT8)
    turning = np.full((steps, size), small, np.float32)
    turning[:, 0] = np.where(np.arange(steps) % 4 < 2, 1.0, -1.0)
    turning[:, 1] = np.roll(turning[:, 0], 1)

    def step(state, gradient):
        update, state = tx.update(gradient, state)
        return state, update

    run = jax.jit(lambda state, stacked: jax.lax.scan(step, state, stacked))
    state, updates = run(tx.init(jnp.zeros(size)), jnp.asarray(turning))
    left = quantized.load(state.error, jnp.float32).reshape(-1)
    heard = np.asarray(updates, np.float64).sum(axis=0) + left
    # 3,999 roundings to units of at most 1 / 32, most of them to zero.
    assert np.abs(heard[2:] - steps * small).max() <= 1.5


def test_a_skipped_step_leaves_every_bit():
    for tx in (
        efcp_jax.sparse_mfac(0.1, 3, 0.25, **INT8),
        efcp_jax.low_rank_ggt(0.1, 3, 1, **INT8),
    ):
        stacked, update = cases.gradients(6), jax.jit(tx.update)
        state = tx.init(cases.params())
        for t in range(6):
            _, state = update(cases.at(stacked, t), state)
        bad = jax.tree.map(lambda x: x * jnp.nan, cases.at(stacked, 0))
        result, after = update(bad, state)
        assert not any(leaf.any() for leaf in jax.tree.leaves(result))
        jax.tree.map(np.testing.assert_array_equal, after[0].error, state[0].error)


@pytest.mark.slow
def test_states_tell_of_the_error_as_it_is():
    tx = efcp_jax.sparse_mfac(0.1, 3, 0.25, block_size=16, **INT8)
    stacked, state = cases.gradients(4), tx.init(cases.params())
    for t in range(4):
        _, state = tx.update(cases.at(stacked, t), state)
    vector = np.asarray(quantized.load(state[0].error, jnp.float32), np.float64)
    report = efcp_jax.diagnostics(state)
    assert report["error_norm"] == pytest.approx(np.linalg.norm(vector), rel=1e-6)
    fields = efcp_jax.memory_report(tx, cases.params()).fields
    # 44 parameters in blocks of 16: a tile of three, with a unit of two bytes a line.
    assert fields["error.values"] == 16 * 3
    assert fields["error.units"] == 16 * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse", "low rank"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_many_devices_and_moves_between_them(name, kind):
    compressor = {
        "sparse": efcp_jax.top_k(1.0, block_size=4, value_dtype=jnp.bfloat16),
        "low rank": efcp_jax.low_rank(2),
    }[name]

    def make(sharding=None):
        return efcp_jax.scale_by_mfac(
            sharding_cases.WINDOW, compressor=compressor, sharding=sharding, **INT8
        )

    where = sharding_cases.PLACINGS["fsdp x tensor"]
    given = sharding_cases.gradients()
    run = jax.jit(functools.partial(sharding_cases.train, make()))
    alone, _ = run(sharding_cases.params(), given)
    updates, state = sharding_cases.train_on(where, make, given, kind)
    assert state.skipped == 0
    found, exact = map(sharding_cases.vectors, (updates, alone))
    # Other groups are rounded in other ways: the unit is a percent of the largest.
    assert sharding_cases.worst(found, exact) < 0.1
    if kind == AxisType.Auto:
        return
    mesh = where.make_mesh()
    params = jax.device_put(sharding_cases.params(), where.shardings(mesh))
    source, target = (make(), params), (make(), sharding_cases.params())
    there = reshard_state(state, source, target)
    back = reshard_state(there, target, source)
    norms = [
        float(efcp_jax.diagnostics(jax.tree.map(jnp.asarray, each))["error_norm"])
        for each in (jax.device_get(state), there, jax.device_get(back))
    ]
    assert norms == pytest.approx([norms[0]] * 3, rel=0.02)


@pytest.mark.parametrize("size", [1, 7, 256, 300, 512, 601, 1000, 6250])
@pytest.mark.parametrize("ways", [1, 4])
def test_groups_of_many_devices_are_those_of_the_whole_array(size, ways):
    """What every device stores of its part is what all of them have stored."""
    rng = np.random.default_rng(size)
    x = rng.normal(size=(2, ways * size)) * 10.0 ** rng.uniform(-3, 3, (2, ways * size))
    x = x.astype(np.float32)
    spec = P(None, "x" if ways > 1 else None)
    parts = []
    for part in np.split(x, ways, axis=1):
        like = quantized.zeros(jnp.asarray(part), spec, jnp.dtype(jnp.int8))
        parts.append(quantized.store_on_host(part, like))
    whole = jax.tree.map(lambda *each: np.concatenate(each, axis=1), *parts)
    each = [quantized.load(part, np.float32) for part in parts]
    found = quantized.load(whole, np.float32)
    np.testing.assert_array_equal(found, np.concatenate(each, axis=1))
    assert whole.units.nbytes <= max(4 * ways, whole.values.nbytes / 16)

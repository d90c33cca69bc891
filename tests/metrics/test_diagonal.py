"""Diagonal metrics against the textbook in float64, and what must not change them."""

import aliases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import efcp_jax
from efcp_jax.devices import placement
from efcp_jax.devices.sections import section
from efcp_jax.metrics import Gradient, MetricState


SHAPES = {"k": (2, 3, 5), "s": (), "v": (7,), "w": (6, 4)}
FACTORED = {"k", "w"}
ALL = sum(int(np.prod(shape)) for shape in SHAPES.values())
STEPS = 6
METRICS = {
    "factored": efcp_jax.diagonal_metric(),
    "full": efcp_jax.diagonal_metric(0.9, 0.3, factored=False),
}


def params(dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def gradients(steps=STEPS, seed=0, dtype=jnp.float32):
    """Return gradients whose entries differ by some orders of magnitude."""
    rng = np.random.default_rng(seed)
    scales = {name: np.exp(rng.normal(0, 2, shape)) for name, shape in SHAPES.items()}
    return [
        {
            name: jnp.asarray(rng.normal(size=shape) * scales[name], dtype)
            for name, shape in SHAPES.items()
        }
        for _ in range(steps)
    ]


def oracle(history, decay, floor, factored):
    """Return D of the last gradient, written out from the formula, in float64.

    Every moment is a weighted mean of all squares; the mean over all parameters is that
    of the step before.
    """

    def moments(until):
        weights = decay ** np.arange(until - 1, -1, -1.0)
        found = {}
        for name, shape in SHAPES.items():
            each = [np.asarray(g[name], np.float64) ** 2 for g in history[:until]]
            v = sum(w * x for w, x in zip(weights, each, strict=True)) / weights.sum()
            if factored and name in FACTORED:
                v = v.reshape(-1, shape[-1])
                v = np.outer(v.mean(1), v.mean(0)) / v.mean()
            found[name] = v.reshape(shape)
        return found

    now = moments(len(history))
    if len(history) == 1:
        return {name: np.full(v.shape, 1 + floor) for name, v in now.items()}
    before = moments(len(history) - 1)
    mean = sum(v.sum() for v in before.values()) / ALL
    return {name: np.sqrt(v / mean) + floor for name, v in now.items()}


def diagonals(metric, history, dtype=jnp.float32):
    """Return D of every step: what the identity in the metric divides by."""
    tx = efcp_jax.in_metric(optax.identity(), metric)
    state, found = tx.init(params(dtype)), []
    for gradient in history:
        updates, state = jax.jit(tx.update)(gradient, state)
        found.append(jax.tree.map(lambda g, u: np.asarray(g / u), gradient, updates))
    return found


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_diagonal_is_that_of_the_formula(factored, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        history = gradients(dtype=dtype)
        metric = efcp_jax.diagonal_metric(0.8, 0.2, factored=factored)
        found = diagonals(metric, history, dtype)
    tolerance = 30 * float(jnp.finfo(dtype).eps)
    for step, diagonal in enumerate(found, 1):
        expected = oracle(history[:step], 0.8, 0.2, factored)
        for name in SHAPES:
            np.testing.assert_allclose(diagonal[name], expected[name], rtol=tolerance)


@pytest.mark.parametrize("name", aliases.STRUCTURE)
@pytest.mark.parametrize("metric", METRICS)
def test_the_argument_and_the_wrapper_are_one_step(name, metric):
    metric = METRICS[metric]
    plain, inside = aliases.make(name), aliases.make(name, metric=metric)
    outside = efcp_jax.in_metric(plain, metric)
    each = gradients()
    updates, state = aliases.run(inside, params(), each)
    expected, _ = aliases.run(outside, params(), each)
    aliases.assert_close(updates, expected, 1e-5)
    assert int(state[0].skipped) == 0


@pytest.mark.parametrize("kind", ["ggt", "mfac"])
def test_a_dense_step_is_the_oracle_in_the_coordinates_of_the_metric(kind):
    history, window = gradients(), 4
    make = {
        "ggt": lambda m: efcp_jax.scale_by_ggt(window, 0.1, b1=0.5, metric=m),
        "mfac": lambda m: efcp_jax.scale_by_mfac(window, 0.1, b1=0.5, metric=m),
    }[kind]
    tx = make(efcp_jax.diagonal_metric(0.8, 0.2))
    (updates, _) = aliases.run(tx, params(), history)
    rows = []
    for step, gradient in enumerate(history, 1):
        diagonal = oracle(history[:step], 0.8, 0.2, True)
        root = oracles.flat([diagonal[name] for name in sorted(SHAPES)]) ** -0.5
        rows.append(root * oracles.flat([gradient[n] for n in sorted(SHAPES)]))
        rows = rows[-window:]
        if kind == "ggt":
            inside = oracles.ggt(rows, 0.1, 0.5)
        else:
            inside = oracles.mfac(rows, 0.1, window, b1=0.5)
        update = oracles.flat([updates[name][step - 1] for name in sorted(SHAPES)])
        assert oracles.relative_error(update, root * inside) < 2e-4


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("kind", ["ggt", "mfac"])
def test_the_scale_of_the_loss_changes_no_more_than_eps_and_damping_do(kind, factor):
    metric = efcp_jax.diagonal_metric()
    compressor = efcp_jax.top_k(0.3, block_size=16)
    given = {"compressor": compressor, "metric": metric}

    def updates(scale):
        if kind == "ggt":
            tx = efcp_jax.scale_by_ggt(4, scale * 1e-2, **given)
        else:
            tx = efcp_jax.scale_by_mfac(4, scale**2 * 1e-2, **given)
        scaled = [jax.tree.map(lambda x: scale * x, g) for g in gradients()]
        return aliases.run(tx, params(), scaled)[0]

    expected = updates(1.0)
    if kind == "mfac":  # is in units of one over a gradient
        expected = jax.tree.map(lambda u: u / factor, expected)
    aliases.assert_close(updates(factor), expected, 1e-3)


def test_a_leaf_in_other_units_moves_by_the_same_numbers_without_a_floor():
    tx = efcp_jax.in_metric(optax.identity(), efcp_jax.diagonal_metric(floor=0.0))
    each = gradients()
    stretched = [{**gradient, "w": 1000 * gradient["w"]} for gradient in each]
    first, _ = aliases.run(tx, params(), each)
    second, _ = aliases.run(tx, params(), stretched)
    for name in SHAPES:  # up to the one factor that is the mean of all moments
        ratio = np.asarray(second[name][-1] / first[name][-1])
        reference = np.asarray(second["v"][-1] / first["v"][-1]).mean()
        np.testing.assert_allclose(ratio, reference, rtol=1e-4)


@pytest.mark.parametrize("metric", ["factored", "full"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_skipped_step_leaves_the_moments_as_they_were(metric, bad):
    tx = efcp_jax.scale_by_ggt(
        3, compressor=efcp_jax.top_k(0.5, block_size=8), metric=METRICS[metric]
    )
    each = gradients()
    _, before = aliases.run(tx, params(), each)
    broken = {**each[0], "v": each[0]["v"].at[1].set(bad)}
    updates, after = aliases.run(tx, params(), [broken], before)
    aliases.assert_equal(after.metric, before.metric)
    assert int(after.skipped) == 1
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))
    # And the next step is that of a run that has never met it.
    expected, _ = aliases.run(tx, params(), [each[0]], before)
    actual, _ = aliases.run(tx, params(), [each[0]], after)
    aliases.assert_equal(actual, expected)


def test_the_wrapper_hands_on_what_is_not_finite_and_learns_nothing():
    tx = efcp_jax.in_metric(optax.identity(), METRICS["factored"])
    each = gradients()
    _, before = aliases.run(tx, params(), each)
    broken = {**each[0], "v": each[0]["v"].at[1].set(jnp.nan)}
    updates, after = aliases.run(tx, params(), [broken], before)
    aliases.assert_equal(after, before)
    assert np.isnan(updates["v"]).sum() == 1


def test_a_gradient_of_zeros_is_no_fault():
    zeros = [params()] * 3
    for name in ("sparse_ggt", "sparse_mfac", "low_rank_ggt"):
        tx = aliases.make(name, metric=METRICS["factored"])
        updates, state = aliases.run(tx, params(), zeros + gradients())
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
        assert all(not np.any(leaf[:3]) for leaf in jax.tree.leaves(updates))
        assert any(np.any(leaf[3:]) for leaf in jax.tree.leaves(updates))
        assert int(state[0].skipped) == 0


def test_an_entry_without_a_gradient_stays_still():
    each = [{**g, "v": g["v"].at[2].set(0.0)} for g in gradients()]
    tx = aliases.make("ggt", metric=METRICS["full"])
    updates, _ = aliases.run(tx, params(), each)
    assert not np.any(updates["v"][:, 2])


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-15, 1e15, 1e30, 1e38])
@pytest.mark.parametrize("metric", ["factored", "full"])
def test_gradients_of_any_magnitude_give_finite_steps(scale, metric):
    each = [
        jax.tree.map(lambda x: jnp.clip(scale * x, -3e38, 3e38), g) for g in gradients()
    ]
    each += gradients(seed=1)
    for name in ("sparse_ggt", "mfac"):
        tx = aliases.make(name, metric=METRICS[metric])
        updates, state = aliases.run(tx, params(), each)
        for leaf in jax.tree.leaves((updates, state)):
            assert np.all(np.isfinite(np.asarray(leaf, np.float64)))
        assert int(state[0].skipped) == 0


def test_complex_leaves_have_one_moment_for_both_parts():
    rng = np.random.default_rng(0)
    tree = {"z": jnp.zeros((3, 4), jnp.complex64)}
    value = rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4))
    turned = np.exp(0.7j) * value
    metric = efcp_jax.diagonal_metric(factored=False)
    tx = efcp_jax.in_metric(optax.identity(), metric)
    runs = [
        aliases.run(tx, tree, [{"z": jnp.asarray(v, jnp.complex64)}] * 3)
        for v in (value, turned)
    ]
    np.testing.assert_allclose(
        np.exp(0.7j) * runs[0][0]["z"], runs[1][0]["z"], rtol=1e-5
    )
    assert runs[0][1].metric.moments["3x4"].dtype == jnp.float32


def test_moments_have_the_shapes_and_the_dtype_that_are_documented():
    tx = efcp_jax.scale_by_ggt(3, metric=efcp_jax.diagonal_metric(dtype=jnp.bfloat16))
    _, state = aliases.run(tx, params(jnp.bfloat16), gradients(dtype=jnp.bfloat16))
    kept = state.metric.moments
    assert kept["6x4"].rows.shape == (1, 6)
    assert kept["6x4"].cols.shape == (1, 4)
    assert kept["2x3x5"].rows.shape == (1, 2, 3)
    assert kept["7"].shape == (7,)
    assert kept["1"].shape == ()
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}
    assert state.metric.mean.dtype == jnp.float32
    report = efcp_jax.memory_report(tx, params())
    assert report.fields["metric.moments"] == 2 * (6 + 4 + 6 + 5 + 7 + 1)
    assert efcp_jax.scale_by_ggt(3).init(params()).metric is None


def test_moments_of_leaves_that_are_alike_are_stacked_and_those_of_each():
    more = lambda g: {"w2": 3 * g["w"], "a": g["v"] + 1}
    history = [g | more(g) for g in gradients()]
    tree = jax.tree.map(jnp.zeros_like, history[0])
    tx = efcp_jax.scale_by_ggt(3, metric=efcp_jax.diagonal_metric())
    kept = aliases.run(tx, tree, history)[1].metric.moments
    assert kept["6x4"].rows.shape == (2, 6)
    for place, name in enumerate(["w", "w2"]):
        alone = aliases.run(tx, {"x": tree[name]}, [{"x": g[name]} for g in history])
        for both, one in zip(kept["6x4"], alone[1].metric.moments["6x4"], strict=True):
            np.testing.assert_allclose(both[place], one[0], rtol=1e-6)
    squares = [np.asarray(g["a"], np.float64) ** 2 for g in history]
    weights = 0.95 ** np.arange(STEPS - 1, -1, -1.0)
    expected = np.average(squares, axis=0, weights=weights)
    np.testing.assert_allclose(kept["7"][0], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("factored", [True, False])
def test_a_gradient_is_scaled_alike_as_a_whole_and_where_it_is_read(factored, dtype):
    """As many leaves as each has rows, leaves alone, and cuts through rows."""
    shapes = [(3, 5), (70, 300), (3, 5), (3, 5), (1000,), (40,), (40,), ()]
    params = {str(i): jnp.zeros(shape) for i, shape in enumerate(shapes)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draws = zip(params, keys, shapes, strict=True)
    gradient = {name: jax.random.normal(key, shape) for name, key, shape in draws}
    metric = efcp_jax.diagonal_metric(factored=factored, dtype=dtype)
    layout = placement.layout(params, jnp.float32, None)
    state = MetricState(jnp.float32(1), metric.init(layout).moments)
    measured = metric.measure(layout, gradient, state, jnp.int32(0), True)
    scaled = jax.tree.leaves(measured.scaled(gradient))
    flat = np.concatenate([np.ravel(scaled[i]) for i in layout.order])
    pieces = Gradient(gradient, measured).pieces(layout)
    for size in (len(flat), 137, 5000):
        parts = [section(pieces, at, size) for at in range(0, len(flat), size)]
        read = np.concatenate(parts)[: len(flat)]
        np.testing.assert_allclose(read, flat, rtol=5e-7)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"decay": 1.0}, ValueError, "decay"),
        ({"decay": -0.1}, ValueError, "decay"),
        ({"decay": "x"}, TypeError, "decay"),
        ({"decay": lambda step: 0.9}, TypeError, "schedule"),
        ({"decay": jnp.asarray(0.9)}, TypeError, "Python value"),
        ({"floor": -1.0}, ValueError, "floor"),
        ({"floor": float("nan")}, ValueError, "floor"),
        ({"factored": 1}, TypeError, "factored"),
        ({"dtype": jnp.int8}, ValueError, "dtype"),
    ],
)
def test_bad_arguments_are_named(given, error, words):
    with pytest.raises(error, match=words):
        efcp_jax.diagonal_metric(**given)


@pytest.mark.parametrize("metric", [True, 0.95, "adam", efcp_jax.diagonal_metric])
def test_what_is_no_metric_is_refused(metric):
    for make in (efcp_jax.scale_by_ggt, efcp_jax.error_feedback):
        with pytest.raises(TypeError, match="metric"):
            make(metric=metric)
    with pytest.raises(TypeError, match="metric"):
        efcp_jax.in_metric(optax.identity(), metric)


@pytest.mark.parametrize("factored", [True, False])
def test_diagnostics_tell_how_uneven_the_metric_is(factored):
    history = gradients()
    metric = efcp_jax.diagonal_metric(0.8, 0.0, factored=factored)
    tx = efcp_jax.scale_by_ggt(3, metric=metric)
    _, state = aliases.run(tx, params(), history)
    found = efcp_jax.diagnostics(state)
    # D of one more gradient of the same moments, up to the mean.
    diagonal = oracles.flat(oracle(history, 0.8, 0.0, factored).values())
    expected = np.std(diagonal) / np.sqrt(np.mean(diagonal**2))
    np.testing.assert_allclose(found["metric_spread"], expected, rtol=1e-4)
    weights = 0.8 ** np.arange(STEPS - 1, -1, -1.0)
    squares = [np.mean(oracles.flat(g.values()) ** 2) for g in history]
    rms = np.sqrt(np.average(squares, weights=weights))
    np.testing.assert_allclose(found["gradient_rms"], rms, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("window", [3, 520])
def test_the_moment_of_mfac_is_taken_over_the_window(window, nesterov):
    """At 520 rows the factorisation is kept from step to step."""
    tx = efcp_jax.scale_by_mfac(window, 0.1, b1=0.7, nesterov=nesterov)
    history = gradients()
    updates, _ = aliases.run(tx, params(), history)
    rows = [oracles.flat([g[name] for name in sorted(SHAPES)]) for g in history]
    for step in range(STEPS):
        held = rows[max(0, step + 1 - window) : step + 1]
        expected = oracles.mfac(held, 0.1, window, 0.7, nesterov)
        update = oracles.flat([updates[name][step] for name in sorted(SHAPES)])
        assert oracles.relative_error(update, expected) < 1e-4


def test_the_moment_of_ggt_may_look_ahead():
    tx = efcp_jax.scale_by_ggt(3, 0.1, b1=0.7, b2=0.9, nesterov=True)
    history = gradients()
    updates, _ = aliases.run(tx, params(), history)
    rows = [oracles.flat([g[name] for name in sorted(SHAPES)]) for g in history]
    for step in range(STEPS):
        held = rows[max(0, step - 2) : step + 1]
        expected = oracles.ggt(held, 0.1, 0.7, 0.9, nesterov=True)
        update = oracles.flat([updates[name][step] for name in sorted(SHAPES)])
        assert oracles.relative_error(update, expected) < 1e-4

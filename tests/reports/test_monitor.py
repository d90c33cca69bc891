"""The figures of a step against float64, and that watching changes nothing."""

import functools

import aliases
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import sharding_cases

import efcp_jax
from efcp_jax.reports.monitor import ratio_quartiles


FIGURES = tuple(name for name in efcp_jax.MonitorState._fields if name != "inner_state")
OPTIMIZERS = {
    **{name: functools.partial(aliases.make, name) for name in aliases.STRUCTURE},
    "block_diagonal": functools.partial(
        aliases.make, "low_rank_mfac", block_diagonal=True
    ),
    "adam": functools.partial(optax.adam, 1e-2),
    "feedback": lambda: optax.chain(
        efcp_jax.error_feedback(efcp_jax.top_k(0.5)), optax.sgd(0.1)
    ),
}
QUARTILE = 2**-8  # half the distance of two numbers of 7 bits behind the leading one


def flat(tree):
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    joined = np.concatenate(leaves)
    wide = np.complex128 if np.iscomplexobj(joined) else np.float64
    return joined.astype(wide)


def expected(gradient, update):
    g, u = flat(gradient), flat(update)
    norms = np.linalg.norm(g), np.linalg.norm(u)
    cosine = -np.vdot(g, u).real / (norms[0] * norms[1])
    ratios = np.abs(u[g != 0]) / np.abs(g[g != 0])
    return {
        "cosine": cosine,
        "angle": np.degrees(np.arccos(cosine)),
        "gradient_norm": norms[0],
        "update_norm": norms[1],
        "ratio_quartiles": quartiles(ratios),
    }


def quartiles(ratios):
    return np.quantile(ratios, [0.25, 0.5, 0.75], method="inverted_cdf")


def check(state, gradient, update, tolerance=1e-5):
    for name, value in expected(gradient, update).items():
        got = np.asarray(optax.tree.get(state, name), np.float64)
        if name == "ratio_quartiles":
            np.testing.assert_allclose(got, value, rtol=QUARTILE + tolerance)
        else:
            slack = 0.03 if name == "angle" else tolerance
            np.testing.assert_allclose(got, value, rtol=tolerance, atol=slack)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_figures_equal_numpy_and_nothing_else_is_changed(name):
    params = aliases.params()
    plain, watched = OPTIMIZERS[name](), efcp_jax.monitor(OPTIMIZERS[name]())
    updates = [jax.jit(tx.update) for tx in (plain, watched)]
    states = [plain.init(params), watched.init(params)]
    first = aliases.types(states[1])
    for gradient in aliases.gradients(params):
        expected_update, states[0] = updates[0](gradient, states[0], params)
        update, states[1] = updates[1](gradient, states[1], params, unexpected=1)
        # Another program, so XLA may join other operations, which round otherwise.
        aliases.assert_close(update, expected_update, tolerance=1e-6)
        check(states[1], gradient, update)
    assert aliases.types(states[1]) == first
    assert updates[1]._cache_size() == 1
    aliases.assert_close(states[1].inner_state, states[0])
    assert optax.tree.get(states[1], "monitored") == aliases.STEPS
    # Of the inner state, or 0 where there is no such figure.
    rank, ratio = (
        float(optax.tree.get(states[1], each))
        for each in ("effective_rank", "error_ratio")
    )
    if name in ("adam", "feedback"):
        assert rank == ratio == 0
        return
    known = efcp_jax.diagnostics(states[0])
    ranks = [np.ravel(leaf) for leaf in jax.tree.leaves(known["effective_rank"])]
    assert rank == pytest.approx(np.mean(np.concatenate(ranks)), rel=1e-5)
    assert 1 <= rank <= aliases.WINDOW
    assert ratio == pytest.approx(float(known.get("error_ratio", 0)), rel=1e-5)
    assert (ratio > 0) == (name not in ("mfac", "ggt"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64"])
def test_figures_of_every_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = aliases.params(dtype)
        tx = efcp_jax.monitor(aliases.make("sparse_ggt"))
        state = tx.init(params)
        first = aliases.types(state)
        for gradient in aliases.gradients(params, 2):
            update, state = jax.jit(tx.update)(gradient, state, params)
            check(state, gradient, update)
        assert aliases.types(state) == first
        wide = "float64" if dtype == "float64" else "float32"
        assert optax.tree.get(state, "cosine").dtype == wide


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_norms_far_from_one_neither_overflow_nor_vanish(factor):
    tx = efcp_jax.monitor(optax.sgd(0.5))
    gradient = {"a": factor * jnp.array([3.0, 0.0, 4.0])}
    _, state = tx.update(gradient, tx.init(gradient))
    assert float(state.gradient_norm) == pytest.approx(5 * factor, rel=1e-6)
    assert float(state.update_norm) == pytest.approx(2.5 * factor, rel=1e-6)
    assert float(state.cosine) == pytest.approx(1, abs=1e-6)
    assert float(state.angle) == pytest.approx(0, abs=0.03)
    np.testing.assert_allclose(state.ratio_quartiles, 0.5, rtol=QUARTILE)


def test_the_update_of_a_bare_preconditioner_climbs():
    tx = efcp_jax.monitor(efcp_jax.scale_by_mfac(2))
    gradient = jnp.array([1.0, 2.0])
    _, state = tx.update(gradient, tx.init(gradient))
    assert float(state.cosine) == pytest.approx(-1, abs=1e-6)
    assert float(state.angle) == pytest.approx(180, abs=0.03)


def test_zero_gradients_have_figures_of_zero():
    tx = efcp_jax.monitor(aliases.make("sparse_mfac"))
    zero = jax.tree.map(jnp.zeros_like, aliases.params())
    with jax.debug_nans(True):
        _, state = jax.jit(tx.update)(zero, tx.init(zero), zero)
    assert float(state.angle) == 90
    figures = [getattr(state, name) for name in FIGURES[1:] if name != "angle"]
    assert not any(np.any(each) for each in figures)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_spoils_one_step(bad):
    tx, params = efcp_jax.monitor(aliases.make("sparse_mfac")), aliases.params()
    good = aliases.gradients(params, 1)[0]
    faulty = {**good, "bias": good["bias"].at[1].set(bad)}
    state = tx.init(params)
    _, state = tx.update(faulty, state, params)
    assert not np.isfinite(state.gradient_norm)
    assert np.isnan(state.cosine)
    assert state.update_norm == 0
    np.testing.assert_array_equal(state.ratio_quartiles, 0)
    update, state = tx.update(good, state, params)
    check(state, good, update)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 1000])
def test_quartiles_are_those_of_sorting(count):
    rng = np.random.default_rng(count)
    u, g = np.exp(4 * rng.normal(size=(2, count))).astype(np.float32)
    g[rng.random(count) < 0.2] = 0
    g[0] = -1
    cut = count // 3
    split = lambda x: {"a": jnp.asarray(x[:cut]), "b": jnp.asarray(x[cut:, None])}
    got = jax.jit(ratio_quartiles)(split(-u), split(g))
    known = g != 0
    value = quartiles(np.abs(u[known] / g[known]).astype(np.float64))
    np.testing.assert_allclose(got, value, rtol=QUARTILE)


def test_quartiles_beyond_the_range_are_zero_or_infinite():
    u = jnp.array([0.0, 1.0, 1e30, jnp.nan])
    g = jnp.array([1.0, 1.0, 1e-30, 1.0])
    got = np.asarray(ratio_quartiles(u, g))
    np.testing.assert_allclose(got, [0, 1, np.inf], rtol=QUARTILE)


def test_quartiles_under_vmap_are_those_of_each():
    u, g = np.random.default_rng(0).normal(size=(2, 3, 50))
    got = jax.vmap(ratio_quartiles)(jnp.asarray(u), jnp.asarray(g))
    value = [quartiles(np.abs(a / b)) for a, b in zip(u, g, strict=True)]
    np.testing.assert_allclose(got, value, rtol=QUARTILE + 1e-6)


def test_figures_of_every_third_step_are_kept_for_the_others():
    params = aliases.params()
    gradients = aliases.gradients(params, 7)
    tx = efcp_jax.monitor(aliases.make("sparse_ggt"), every=3)
    step = jax.jit(tx.update)
    state = tx.init(params)
    for index, gradient in enumerate(gradients):
        update, state = step(gradient, state, params)
        if index % 3 == 0:
            shown = gradient, update
        check(state, *shown)
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", FIGURES)
def test_names_are_found_in_wrapped_states_and_are_nobody_elses(name):
    params = {"layer": aliases.params()}
    inject = optax.inject_hyperparams(
        efcp_jax.sparse_mfac, static_args=("window_size", "density")
    )
    inners = [*OPTIMIZERS.values(), lambda: inject(0.1, window_size=2, density=0.5)]
    inners += [lambda: optax.adamw(1e-3), lambda: optax.lbfgs(1e-3)]
    for make in inners:
        tx = optax.masked(optax.chain(optax.clip(1.0), efcp_jax.monitor(make())), True)
        assert optax.tree.get(tx.init(params), name).ndim <= 1


def test_map_params_and_a_checkpoint_keep_the_state(tmp_path):
    params = aliases.params()
    tx = efcp_jax.monitor(aliases.make("low_rank_ggt"))
    gradients = aliases.gradients(params)
    _, state = aliases.run(tx, params, gradients)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    aliases.assert_equal(mapped, state)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", abstract)
    aliases.assert_equal(restored, state)
    continued = [aliases.run(tx, params, gradients, each) for each in (state, restored)]
    aliases.assert_equal(*continued)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placing", "kind", "every"),
    [
        ("data", AxisType.Auto, 1),
        ("fsdp x tensor", AxisType.Explicit, 1),
        ("fsdp x tensor", AxisType.Auto, 2),
        ("mixed", AxisType.Explicit, 2),
    ],
)
def test_figures_on_a_mesh_are_those_of_one_device(placing, kind, every):
    where, stacked = sharding_cases.PLACINGS[placing], sharding_cases.gradients()

    def make(sharding=None):
        tx = sharding_cases.ALIASES["low_rank_mfac"](sharding=sharding)
        return efcp_jax.monitor(tx, every=every)

    updates, state = sharding_cases.train_on(where, make, stacked, kind)
    last = (sharding_cases.STEPS - 1) // every * every
    of_step = lambda tree: jax.tree.map(lambda leaf: leaf[last], tree)
    check(state, of_step(stacked), of_step(updates))
    alone = jax.jit(functools.partial(sharding_cases.train, make()))
    _, reference = alone(sharding_cases.params(), stacked)
    for name in FIGURES:
        value, like = getattr(state, name), getattr(reference, name)
        assert value.sharding.is_fully_replicated
        slack = 2 * QUARTILE if name == "ratio_quartiles" else 1e-4
        np.testing.assert_allclose(value, like, rtol=slack)


@pytest.mark.slow
def test_a_mesh_outside_of_traced_functions():
    where = sharding_cases.PLACINGS["fsdp"]
    mesh = where.make_mesh()
    params = jax.device_put(sharding_cases.params(), where.shardings(mesh))
    gradient = jax.tree.map(lambda x: x[0], sharding_cases.gradients())
    gradient = jax.device_put(gradient, where.shardings(mesh))
    tx = efcp_jax.monitor(sharding_cases.ALIASES["sparse_mfac"]())
    shardings = efcp_jax.sharding.state_shardings(tx, params)
    with jax.set_mesh(mesh):
        state = jax.device_put(tx.init(params), shardings)
    update, state = tx.update(gradient, state, params)
    check(state, gradient, update)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((0.1,), TypeError, "`tx` must be a gradient transformation"),
        ((optax.sgd(0.1), 0), ValueError, "`every` must be an integer >= 1"),
        ((optax.sgd(0.1), 2.0), TypeError, "`every` must be an integer >= 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, kind, text):
    tx, *every = arguments
    with pytest.raises(kind, match=text):
        efcp_jax.monitor(tx, **dict(zip(["every"], every, strict=False)))

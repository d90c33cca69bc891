"""The damping against the rule, step by step, in float64."""

import aliases
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest
import sharding_cases

import efcp_jax
from efcp_jax import adaptive_damping


CURVATURE = np.array([0.1, 1.0, 4.0])


def loss(x):
    return jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * x**2) / 2 + jnp.sum(x**4)


def exact(x):
    return np.sum(CURVATURE * x**2) / 2 + np.sum(x**4)


def make(damping, rate=0.1):
    return efcp_jax.mfac(rate, window_size=2, damping=damping)


def run(tx, steps, x=(1.0, -1.0, 2.0), value_fn=loss):
    """Return parameters, gradients, updates and states of all steps."""
    x = jnp.asarray(x, jnp.float32)
    state, history = tx.init(x), []
    step = jax.jit(lambda g, s, x: tx.update(g, s, x, value_fn=value_fn))
    for _ in range(steps):
        gradient = jax.grad(loss)(x)
        update, state = step(gradient, state, x)
        history.append((x, gradient, update, state))
        x = x + update
    assert step._cache_size() == 1
    return history


# Rates that predictions are right for, half right for and wrong for.
@pytest.mark.parametrize("rate", [0.01, 0.3, 0.6, 2.0])
@pytest.mark.parametrize("every", [1, 3])
def test_the_damping_follows_the_rule(rate, every):
    tx = adaptive_damping(
        lambda damping: make(damping, rate), 1.0, every=every, decay=0.8
    )
    expected = 1.0
    for number, each in enumerate(run(tx, 12), start=1):
        x, gradient, update = (np.asarray(leaf, np.float64) for leaf in each[:3])
        if number % every == 0:
            ratio = (exact(x + update) - exact(x)) / (gradient @ update)
            if gradient @ update < 0:
                if ratio > 0.75:
                    expected *= 0.8**every
                elif ratio < 0.25:
                    expected /= 0.8**every
                expected = np.clip(expected, 1e-8, 1e2)
                found = optax.tree.get(each[3], "reduction_ratio")
                assert float(found) == pytest.approx(ratio, rel=1e-2, abs=1e-4)
        damping = float(optax.tree.get(each[3], "damping"))
        assert damping == pytest.approx(expected, rel=1e-5)
    # The case is one of those that the rule tells apart.
    assert (expected < 1) == (rate < 0.5) or rate == 0.6


def test_an_update_is_that_of_the_damping_in_front_of_it():
    tx = adaptive_damping(make, 0.5, every=1)
    value, x = jnp.asarray(0.5, jnp.float32), jnp.asarray([1.0, -1.0, 2.0])
    inner = make(0.5).init(x)
    for x, gradient, update, state in run(tx, 5):
        expected, inner = make(value).update(gradient, inner, x)
        np.testing.assert_allclose(update, expected, rtol=1e-5)
        value = state.damping


@pytest.mark.parametrize(("after", "bound"), [(loss, 0.9), (lambda p: jnp.inf, 1.5)])
def test_the_damping_stays_between_its_bounds(after, bound):
    tx = adaptive_damping(
        lambda d: make(d, 0.01), 1.0, every=1, decay=0.8, low=0.9, high=1.5
    )
    last = run(tx, 3, value_fn=after)[-1][3]
    assert float(last.damping) == pytest.approx(bound)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_value_that_is_not_finite_raises_the_damping(bad):
    tx = adaptive_damping(make, 1.0, every=1, decay=0.5)
    x = jnp.asarray([1.0, -1.0, 2.0])
    value_fn = lambda p: jnp.where(jnp.all(p == x), 1.0, bad)
    _, state = tx.update(jax.grad(loss)(x), tx.init(x), x, value_fn=value_fn)
    assert float(state.damping) == pytest.approx(2.0)


def test_a_skipped_step_and_one_that_climbs_leave_the_damping():
    tx = adaptive_damping(make, 1.0, every=1)
    x = jnp.asarray([1.0, -1.0, 2.0])
    faulty = jnp.asarray([jnp.nan, 1.0, 1.0])
    update, state = tx.update(faulty, tx.init(x), x, value_fn=loss)
    np.testing.assert_array_equal(update, 0)
    assert state.damping == 1
    climbing = adaptive_damping(lambda d: optax.scale(d), 1.0, every=1)
    _, state = climbing.update(jax.grad(loss)(x), climbing.init(x), x, value_fn=loss)
    assert state.damping == 1


def test_a_known_value_is_not_evaluated_again():
    tx, calls = adaptive_damping(make, 1.0, every=1), []
    x = jnp.asarray([1.0, -1.0, 2.0])

    def value_fn(p):
        calls.append(None)
        return loss(p)

    gradient = jax.grad(loss)(x)
    _, known = tx.update(gradient, tx.init(x), x, value_fn=value_fn, value=loss(x))
    assert len(calls) == 1
    _, evaluated = tx.update(gradient, tx.init(x), x, value_fn=value_fn)
    assert len(calls) == 3
    assert known.damping == evaluated.damping


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_state_is_a_fixed_point_for_every_alias_and_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = aliases.params(dtype)
        value_fn = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
        for name in ("mfac", "sparse_mfac", "low_rank_mfac"):
            tx = adaptive_damping(
                lambda d, name=name: aliases.make.__wrapped__(name, damping=d), 0.25
            )
            state = tx.init(params)
            first = aliases.types(state)
            _, state = aliases.run(
                tx, params, aliases.gradients(params, 6), value_fn=value_fn
            )
            assert aliases.types(state) == first
            assert float(state.damping) > 0
            mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
            assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_vmap_gives_each_run_a_damping_of_its_own():
    tx = adaptive_damping(lambda d: make(d, 0.3), 1.0, every=1)
    starts = jnp.asarray([[1.0, -1.0, 2.0], [1e-2, 1e-2, -1e-2]])

    def one(x):
        step = lambda state: tx.update(jax.grad(loss)(x), state, x, value_fn=loss)[1]
        return step(tx.init(x)).damping

    together = jax.vmap(one)(starts)
    np.testing.assert_allclose(together, [one(x) for x in starts], rtol=1e-6)
    assert together[0] != together[1]


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_on_a_mesh_the_damping_is_that_of_one_device(kind):
    where = sharding_cases.PLACINGS["fsdp x tensor"]
    # With the gradient of a linear function every step is predicted exactly.
    weights = jax.tree.map(lambda x: x[0], sharding_cases.gradients())
    value_fn = lambda p: sum(jnp.sum(w * p[name]) for name, w in weights.items())

    def make_tx(sharding=None):
        return adaptive_damping(
            lambda damping: efcp_jax.mfac(
                0.1, sharding_cases.WINDOW, damping, sharding=sharding
            ),
            1.0,
        )

    mesh = where.make_mesh(kind)
    shardings = where.shardings(mesh)
    tx = make_tx(None if kind == AxisType.Explicit else shardings)
    params = jax.device_put(sharding_cases.params(), shardings)
    gradient = jax.device_put(weights, shardings)
    alone = make_tx()
    one_state, state = alone.init(sharding_cases.params()), tx.init(params)
    with jax.set_mesh(mesh):
        weights = gradient
        update = jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=value_fn))
        for _ in range(5):
            _, state = update(gradient, state, params)
    weights = jax.device_get(gradient)
    for _ in range(5):
        _, one_state = alone.update(
            weights, one_state, sharding_cases.params(), value_fn=value_fn
        )
    assert float(one_state.damping) == pytest.approx(0.95**5)
    assert float(state.damping) == pytest.approx(0.95**5)
    assert float(state.reduction_ratio) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"make_tx": optax.sgd(0.1)}, TypeError, "`make_tx` must be a function"),
        ({"damping": 0.0}, ValueError, r"`damping` must be in \[1e-08, 100\]"),
        ({"every": 0}, ValueError, "`every` must be an integer >= 1"),
        ({"decay": 1.0}, ValueError, r"`decay` must be in \(0, 1\)"),
        ({"low": 0.0}, ValueError, r"`low` must be in \(0, inf\)"),
        ({"low": 1.0, "high": 0.5}, ValueError, r"`high` must be in \[1, inf\)"),
    ],
)
def test_bad_arguments_are_refused(given, kind, text):
    with pytest.raises(kind, match=text):
        adaptive_damping(**{"make_tx": make, **given})


def test_a_missing_value_fn_is_asked_for():
    tx, x = adaptive_damping(make), jnp.ones(3)
    with pytest.raises(ValueError, match="value_fn=value_fn"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match="value_fn=value_fn"):
        tx.update(x, tx.init(x), value_fn=loss)

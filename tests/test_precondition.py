"""The gradient itself preconditioned by the compressed window, against float64."""

import functools

import cases
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import oracles
import pytest
import sharding_cases

import efcp_jax


M, STEPS = cases.WINDOW, 8
# Of those that differ in their options only, one.
KINDS = (
    *("identity-bf16", "top_k", "top_k-blocks", "top_k-blocks-int8"),
    *("top_k-words-bf16", "low_rank", "low_rank-per-leaf"),
)
COMPRESSORS = {name: cases.COMPRESSORS[name] for name in KINDS} | {
    "by_label": cases.MIXED
}
BY_LEAF = ("identity-bf16", "top_k-blocks", "low_rank", "by_label")


def rows(space, state):
    """Return the rows of the window, in float64."""
    window, found = state.window, []
    for slot, scale in enumerate(window.scale):
        row = space.unpack(space.expand(cases.stored_row(space, window.rows, slot)))
        found.append(float(scale) * oracles.flat(jax.tree.leaves(row)))
    return np.stack(found)


def expected(stored, gradient, damping, relative, filled):
    """Return the damped inverse of the Fisher matrix times the gradient."""
    square = np.sum(stored**2) / filled
    if relative:
        damping *= square / M
    fisher = stored.T @ stored / M
    product = np.linalg.solve(fisher + damping * np.eye(len(gradient)), gradient)
    return product * np.sqrt(square) if relative else product


def check(name, factor=1.0, *, relative=False, block_diagonal=False, **given):
    tx = efcp_jax.scale_by_mfac(
        M,
        0.3,
        relative=relative,
        compressor=COMPRESSORS[name],
        block_diagonal=block_diagonal,
        precondition="gradient",
        **given,
    )
    layout = efcp_jax.devices.placement.layout(cases.params(), jnp.float32, None)
    space = efcp_jax.compressors.scoped(COMPRESSORS[name], block_diagonal).bind(layout)
    state, update = tx.init(cases.params()), jax.jit(tx.update)
    stacked = cases.gradients(STEPS)
    for t in range(STEPS):
        gradient = jax.tree.map(lambda x: x * factor, cases.at(stacked, t))
        result, state = update(gradient, state)
        found = oracles.flat(jax.tree.leaves(result))
        vector = oracles.flat(jax.tree.leaves(gradient))
        stored, filled = rows(space, state), min(t + 1, M)
        exact = np.zeros_like(vector)
        for part in cases.parts("low_rank-per-leaf" if block_diagonal else name):
            block = stored[:, part], vector[part]
            exact[part] = expected(*block, 0.3, relative, filled)
        assert oracles.relative_error(found, exact) <= 2e-6


@pytest.mark.parametrize("name", COMPRESSORS)
def test_updates_are_those_of_the_gradient_and_not_of_its_row(name):
    check(name)


@pytest.mark.parametrize("factor", [1.0, 1e-25, 1e12])
@pytest.mark.parametrize("name", ["top_k-blocks", "top_k-blocks-int8", "by_label"])
def test_relative_ones_are_for_gradients_of_any_magnitude(name, factor):
    check(name, factor, relative=True)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", BY_LEAF)
def test_every_leaf_by_its_own_matrix(name, relative):
    check(name, relative=relative, block_diagonal=True)


def test_without_feedback():
    check("top_k-blocks", error_feedback=False)


def test_in_a_metric_it_is_the_gradient_in_the_metric():
    roots = {"bias": 2.0, "gain": 0.5, "kernel": 4.0, "weight": 0.25}
    metric = efcp_jax.fixed_metric({name: root**2 for name, root in roots.items()})
    make = functools.partial(
        efcp_jax.scale_by_mfac,
        M,
        compressor=COMPRESSORS["top_k-blocks"],
        precondition="gradient",
    )
    over = lambda tree: {name: x / roots[name] for name, x in tree.items()}
    stacked = cases.gradients(STEPS)
    found, _ = cases.run(make(metric=metric), stacked, cases.params())
    inside, _ = cases.run(make(), over(stacked), cases.params())
    for name, update in over(inside).items():
        np.testing.assert_allclose(found[name], update, rtol=1e-6)


def test_with_nothing_left_out_it_is_the_row():
    stacked = cases.gradients(STEPS)
    made = [
        efcp_jax.scale_by_mfac(M, precondition=which) for which in ("row", "gradient")
    ]
    a, b = (cases.run(tx, stacked, cases.params())[0] for tx in made)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_small_damping_loses_nothing_along_the_newest_row():
    # Of a gradient that is its own row, the difference of nearly equal vectors over the
    # damping would be nothing but rounding errors.
    tx = efcp_jax.scale_by_mfac(
        M, 1e-9, compressor=efcp_jax.top_k(0.5), precondition="gradient"
    )
    gradient = jnp.asarray([3.0, 0.0, -2.0, 0.0])
    update, _ = tx.update(gradient, tx.init(gradient))
    x = np.asarray(gradient, np.float64)
    exact = oracles.mfac([x], damping=1e-9, divisor=M)
    assert oracles.relative_error(np.asarray(update), exact) <= 1e-6


@pytest.mark.parametrize("relative", [False, True])
def test_gradients_that_are_not_finite_are_skipped_and_extremes_stay_finite(relative):
    tx = efcp_jax.scale_by_mfac(
        3,
        0.1,
        relative=relative,
        compressor=efcp_jax.top_k(0.25, block_size=4),
        precondition="gradient",
    )
    state, update = tx.init(jnp.zeros(12)), jax.jit(tx.update)
    large, small = jnp.finfo(jnp.float32).max, jnp.finfo(jnp.float32).tiny
    rng = np.random.default_rng(0)
    for scale in (0.0, 1.0, small, 0.0, large, -large, small, 1e-20, 1e20, 1.0):
        x = jnp.asarray(scale * rng.uniform(0.1, 1.0, 12), jnp.float32)
        result, state = update(x, state)
        assert np.all(np.isfinite(result))
        for bad in (np.nan, np.inf):
            result, after = update(x.at[5].set(bad), state)
            np.testing.assert_array_equal(result, np.zeros(12))
            jax.tree.map(
                np.testing.assert_array_equal,
                after._replace(skipped=state.skipped, count=state.count),
                state,
            )


@pytest.mark.parametrize("placing", ["data", "fsdp x tensor"])
@pytest.mark.parametrize("representation", ["sparse", "low rank"])
def test_many_devices_give_the_numbers_of_one(placing, representation):
    # Of sharded leaves other blocks are cut, so there all entries are kept.
    density = 0.25 if placing == "data" else 1.0
    compressor = {
        "sparse": efcp_jax.top_k(density, block_size=sharding_cases.BLOCK),
        "low rank": efcp_jax.low_rank(2),
    }[representation]

    def make(sharding=None):
        return efcp_jax.scale_by_mfac(
            sharding_cases.WINDOW,
            compressor=compressor,
            precondition="gradient",
            sharding=sharding,
        )

    where = sharding_cases.PLACINGS[placing]
    given = sharding_cases.gradients()
    run = jax.jit(functools.partial(sharding_cases.train, make()))
    alone, _ = run(sharding_cases.params(), given)
    updates, state = sharding_cases.train_on(where, make, given, AxisType.Explicit)
    assert state.skipped == 0
    found, exact = map(sharding_cases.vectors, (updates, alone))
    assert sharding_cases.worst(found, exact) < 100 * np.finfo(np.float32).eps


@pytest.mark.parametrize("given", [{"b1": 0.9}, {"nesterov": True}])
def test_a_moment_over_the_window_is_refused(given):
    with pytest.raises(ValueError, match=r"needs b1=0\.0.*optax\.trace"):
        efcp_jax.scale_by_mfac(precondition="gradient", **given)

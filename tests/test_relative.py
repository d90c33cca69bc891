"""Damping and eps in units of the window, the default: no scale of the loss."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import efcp_jax
from efcp_jax.preconditioners import system as systems


M, STEPS = 4, 9
ALIASES = [
    *("mfac", "sparse_mfac", "low_rank_mfac"),
    *("ggt", "sparse_ggt", "low_rank_ggt"),
]


def gradients(factor=1.0):
    rng = np.random.default_rng(0)
    draw = lambda: {"w": rng.normal(size=(12, 9)), "b": rng.normal(size=9)}
    trees = [draw() for _ in range(STEPS)]
    return [
        jax.tree.map(lambda x: jnp.asarray(factor * x, jnp.float32), t) for t in trees
    ]


def run(tx, steps):
    state, updates = tx.init(steps[0]), []
    update = jax.jit(tx.update)
    for gradient in steps:
        result, state = update(gradient, state, gradient)
        updates.append(oracles.flat(jax.tree.leaves(result)))
    return np.stack(updates)


def damped(rows):
    """Return the update of relative M-FAC in float64, damped by a tenth."""
    square = np.mean(np.sum(np.square(rows), axis=1))
    exact = oracles.mfac(rows, damping=0.1 * square / M, divisor=M)
    return np.sqrt(square) * exact


def softened(rows):
    """Return the update of relative GGT in float64."""
    square = np.mean(np.sum(np.square(rows), axis=1))
    return oracles.ggt(rows, eps=1e-3 * np.sqrt(square))


@pytest.mark.parametrize(
    ("tx", "exact"),
    [
        (efcp_jax.scale_by_mfac(M), damped),
        (efcp_jax.scale_by_mfac(M, 0.1, relative=True), damped),
        (efcp_jax.scale_by_ggt(M), softened),
        (efcp_jax.scale_by_ggt(M, 1e-3, relative=True), softened),
    ],
)
def test_steps_are_those_of_the_oracle_in_units_of_the_window(tx, exact):
    steps = gradients()
    rows = np.stack([oracles.flat(jax.tree.leaves(step)) for step in steps])
    for t, update in enumerate(run(tx, steps)):
        expected = exact(rows[max(0, t + 1 - M) : t + 1])
        assert oracles.relative_error(update, expected) <= 1e-5


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("metric", [None, efcp_jax.diagonal_metric()])
def test_defaults_do_not_see_the_scale_of_the_loss(alias, metric):
    make = lambda **given: getattr(efcp_jax, alias)(1.0, M, metric=metric, **given)
    # Multiples of three digits round to other numbers of half precision.
    tx = make(**(cases.WIDE if "sparse" in alias else {}))
    expected = run(tx, gradients())
    for factor in (1e-3, 1e3):
        found = run(tx, gradients(factor))
        assert oracles.relative_error(found, expected) <= 1e-4
    tx = make()
    expected = run(tx, gradients())
    power = 30 if metric else 60  # a metric squares every entry by itself
    for factor in (2.0**-power, 2.0**power):
        found = run(tx, gradients(factor))
        assert oracles.relative_error(found, expected) <= 1e-4


def test_an_explicit_damping_is_in_the_unit_of_a_squared_gradient():
    tx = efcp_jax.scale_by_mfac(M, 100.0)
    small, large = run(tx, gradients()), run(tx, gradients(1e3))
    assert oracles.relative_error(1e3 * large, small) > 0.01


def test_a_kept_factor_serves_while_the_damping_changes_by_less_than_a_tenth():
    kept = systems.empty(512, jnp.float32)._replace(damping=jnp.float32(1.0))
    for damping, expected in ((1.05, 1.0), (0.95, 1.0), (1.2, 1.2), (0.8, 0.8)):
        near = systems.near(jnp.float32(damping), kept)
        assert float(near) == pytest.approx(expected)
    assert float(systems.near(jnp.float32(3.0), None)) == 3.0


def test_large_windows_follow_the_oracle_to_within_the_kept_damping():
    size, steps = 512, gradients()
    tx = efcp_jax.scale_by_mfac(size, compressor=efcp_jax.identity())
    rows = np.stack([oracles.flat(jax.tree.leaves(step)) for step in steps])
    for t, update in enumerate(run(tx, steps)):
        past = rows[: t + 1]
        square = np.mean(np.sum(np.square(past), axis=1))
        exact = [
            np.sqrt(square)
            * oracles.mfac(past, damping=0.1 * f * square / size, divisor=size)
            for f in (1 / 1.1, 1 / 0.9)
        ]
        far = oracles.relative_error(exact[0], exact[1])
        assert oracles.relative_error(update, exact[0]) <= far + 1e-5

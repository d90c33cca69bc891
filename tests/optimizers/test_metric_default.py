"""When an optimizer is in a metric that nobody named, and when it is as published."""

import aliases
import cases
import jax
import jax.numpy as jnp
import optax
import pytest
from sharding_cases import worst

import efcp_jax


every_optimizer = pytest.mark.parametrize("name", aliases.STRUCTURE)


def run(name, **given):
    """Return updates and state of an optimizer whose damping only `given` names."""
    make = getattr(efcp_jax, name)
    tx = make(1.0, **aliases.STRUCTURE[name], **given)
    return aliases.run(tx, aliases.params(), gradients())


def gradients():
    """Return gradients whose entries differ in size, as the metric sees."""
    size = {"bias": 1.0, "kernel": jnp.logspace(-2, 2, 32).reshape(4, 8)}
    return [
        jax.tree.map(jnp.multiply, size, gradient)
        for gradient in aliases.gradients(aliases.params())
    ]


@pytest.mark.slow
@every_optimizer
@pytest.mark.parametrize("named", [{}, {"relative": True}])
def test_units_of_the_window_are_those_of_the_metric(name, named):
    if named:
        named = {**named, aliases.ridge(name): 0.25}
    default, state = run(name, **named)
    expected, expected_state = run(name, **named, metric=efcp_jax.diagonal_metric())
    aliases.assert_equal((default, state), (expected, expected_state))
    euclidean, _ = run(name, **named, metric=None)
    assert worst(cases.vectors(default), cases.vectors(euclidean)) > 0.1


@pytest.mark.slow
@every_optimizer
@pytest.mark.parametrize(
    "value", [0.25, jnp.float32(0.25), optax.constant_schedule(0.25)]
)
def test_the_published_unit_is_that_of_the_euclidean_metric(name, value):
    named = {aliases.ridge(name): value}
    default, state = run(name, **named)
    aliases.assert_equal((default, state), run(name, **named, metric=None))
    inside, _ = run(name, **named, metric=efcp_jax.diagonal_metric())
    assert worst(cases.vectors(default), cases.vectors(inside)) > 0.1


@pytest.mark.parametrize("name", ["sparse_mfac", "low_rank_ggt"])
def test_the_default_may_be_injected(name):
    make = getattr(efcp_jax, name)
    structure = aliases.STRUCTURE[name]
    inject = optax.inject_hyperparams(make, static_args=tuple(structure))
    tx = inject(learning_rate=1.0, **structure)
    updates, _ = aliases.run(tx, aliases.params(), gradients())
    aliases.assert_close(updates, run(name)[0], 1e-6)


@pytest.mark.parametrize("name", ["sparse_mfac", "sparse_ggt"])
def test_density_one_is_the_dense_optimizer_in_the_metric_too(name):
    dense, _ = run(name.split("_")[1])
    tx = getattr(efcp_jax, name)(1.0, aliases.WINDOW, 1)
    every, _ = aliases.run(tx, aliases.params(), gradients())
    aliases.assert_close(every, dense, 1e-5)


@every_optimizer
@pytest.mark.parametrize("metric", ["diagonal", True, "AUTO"])
def test_what_is_no_metric_is_refused(name, metric):
    with pytest.raises(TypeError, match="`metric` must be a metric"):
        getattr(efcp_jax, name)(1.0, metric=metric)


@every_optimizer
def test_relative_must_be_a_boolean_beside_the_default(name):
    with pytest.raises(TypeError, match="`relative`"):
        getattr(efcp_jax, name)(1.0, relative="yes")

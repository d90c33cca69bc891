"""Equinox: models whose leaves are arrays, functions and numbers."""

import client_task
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest


def loss(model):
    x, y = client_task.data()
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


# What `update` is given as parameters: the model as it is, functions and all, or the
# arrays of it.
GIVEN = {
    "the model": lambda model: model,
    "its arrays": lambda model: eqx.filter(model, eqx.is_array),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_filtered_step_trains_a_model_with_functions_in_it(name, given):
    tx = client_task.make(name)
    model = eqx.nn.MLP(
        client_task.FEATURES,
        1,
        client_task.HIDDEN,
        depth=1,
        activation=jnp.tanh,
        key=jax.random.key(0),
    )
    assert not all(map(eqx.is_array, jax.tree.leaves(model)))

    @eqx.filter_jit
    def step(model, state):
        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(gradient, state, GIVEN[given](model))
        return eqx.apply_updates(model, updates), state, value

    state = tx.init(eqx.filter(model, eqx.is_array))
    losses = []
    for _ in range(client_task.STEPS):
        model, state, value = step(model, state)
        losses.append(value)
    client_task.falls(losses)
    assert optax.tree.get(state[0], "count") == client_task.STEPS

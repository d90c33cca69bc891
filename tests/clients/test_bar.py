"""The bar that the clients have to clear is one that broken optimizers do not."""

import client_task
import jax
from jax import lax
import optax
import pytest


def train(tx):
    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(client_task.loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    params = client_task.params()
    steps = lambda: lax.scan(step, (params, tx.init(params)), length=client_task.STEPS)
    return jax.jit(steps)()[1]


def test_the_optimizers_alone_clear_it(name):
    client_task.falls(train(client_task.make(name)))


@pytest.mark.whole
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_without_updates_or_with_their_sign_reversed_nobody_does(factor):
    tx = optax.chain(client_task.make("ggt"), optax.scale(factor))
    with pytest.raises(AssertionError):
        client_task.falls(train(tx))

"""The bar that training with the clients has to clear is one that nothing else does."""

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


@pytest.mark.whole
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_without_updates_or_with_their_sign_reversed_it_is_not_cleared(factor):
    tx = optax.chain(client_task.make("ggt"), optax.scale(factor))
    with pytest.raises(AssertionError):
        client_task.falls(train(tx), share=1.0)
    client_task.falls(train(client_task.make("ggt")))

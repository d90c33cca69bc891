"""Flax: nnx and linen, and fine-tuning of what LoRA adds."""

import client_task
from flax import linen as nn, nnx
from flax.training import train_state
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(client_task.FEATURES, client_task.HIDDEN, rngs=rngs)
        self.output = nnx.Linear(client_task.HIDDEN, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.tanh(self.hidden(x)))


def nnx_loss(model):
    x, y = client_task.data()
    return jnp.mean((model(x) - y) ** 2)


def train(model, tx, wrt):
    """Return the losses of a training of the variables `wrt` of a model."""
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        of = nnx.DiffState(0, wrt)
        loss, gradient = nnx.value_and_grad(nnx_loss, argnums=of)(model)
        optimizer.update(model, gradient)
        return loss

    return [step(model, optimizer) for _ in range(client_task.STEPS)]


def test_nnx_optimizer_trains(name):
    model = Model(nnx.Rngs(0))
    client_task.falls(train(model, client_task.make(name), nnx.Param))


def test_lora_trains_what_it_adds_and_nothing_else(name):
    rngs = nnx.Rngs(0)
    model = Model(rngs)
    for key in ("hidden", "output"):
        layer = getattr(model, key)
        lora = nnx.LoRA(
            layer.in_features, 2, layer.out_features, base_module=layer, rngs=rngs
        )
        setattr(model, key, lora)
    of = lambda kind: jax.device_get(nnx.to_pure_dict(nnx.state(model, kind)))
    base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    before, frozen = of(nnx.LoRAParam), of(base)
    assert len(jax.tree.leaves(before)) == len(jax.tree.leaves(frozen)) == 4
    client_task.falls(train(model, client_task.make(name), nnx.LoRAParam))
    jax.tree.map(np.testing.assert_array_equal, of(base), frozen)
    changed = jax.tree.map(lambda a, b: np.any(a != b), of(nnx.LoRAParam), before)
    assert all(jax.tree.leaves(changed))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(client_task.HIDDEN)(x)))


def test_linen_train_state_trains(name):
    model, (x, y) = Linen(), client_task.data()
    state = train_state.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x)["params"],
        tx=client_task.make(name),
    )

    def step(state, _):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    steps = jax.jit(lambda state: lax.scan(step, state, length=client_task.STEPS))
    client_task.falls(steps(state)[1])

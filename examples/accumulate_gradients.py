"""Accumulate gradients outside of the optimizer, instead of with `optax.MultiSteps`.

`optax.MultiSteps` computes the inner update on every micro-batch and keeps it on every
k-th only, so k times the cost of a preconditioner is paid. Averaging the gradients of
the micro-batches first gives the same parameters for one k-th of that cost.

    python examples/accumulate_gradients.py
"""

import functools
import time

import jax
from jax import lax
import jax.numpy as jnp
import optax

import efcp_jax


MICRO_BATCHES = 8  # to an update
UPDATES = 20
WIDTH = 512

key = jax.random.key(0)
inputs = list(jax.random.normal(key, (UPDATES, MICRO_BATCHES, 16, WIDTH)))
tx = efcp_jax.sparse_ggt(0.1, window_size=64)


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch @ params) - jnp.sin(batch)) ** 2)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step_outside(params, state, batches):
    def accumulate(total, batch):
        return total + jax.grad(loss_fn)(params, batch) / len(batches), None

    gradient, _ = lax.scan(accumulate, jnp.zeros_like(params), batches)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


multi = optax.MultiSteps(tx, MICRO_BATCHES)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step_multi(params, state, batches):
    def micro_step(carry, batch):
        params, state = carry
        updates, state = multi.update(jax.grad(loss_fn)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return lax.scan(micro_step, (params, state), batches)[0]


def train(step, state):
    params = jnp.zeros((WIDTH, WIDTH))
    params, state = step(params, state, inputs[0])  # compiles
    start = time.perf_counter()
    for batches in inputs[1:]:
        params, state = step(params, state, batches)
    jax.block_until_ready(params)
    return params, 1e3 * (time.perf_counter() - start) / (UPDATES - 1)


zeros = jnp.zeros((WIDTH, WIDTH))
outside, outside_time = train(step_outside, tx.init(zeros))
inside, inside_time = train(step_multi, multi.init(zeros))
difference = jnp.linalg.norm(outside - inside) / jnp.linalg.norm(inside)
print(f"accumulated outside: {outside_time:6.1f} ms an update")
print(f"optax.MultiSteps:    {inside_time:6.1f} ms an update")
print(f"relative difference of the parameters: {difference:.1e}")

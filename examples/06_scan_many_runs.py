"""Several learning rates trained at once: the loop is a scan, the runs are a vmap.

States are arrays of fixed shapes, so a whole training is a function like any other.

    python examples/06_scan_many_runs.py
"""

import jax
import jax.numpy as jnp
import optax
import task

import efcp_jax


RATES = jnp.array([0.25, 0.5, 1.0, 2.0])
images, labels = task.data()
batches = jax.random.randint(
    jax.random.key(2), (task.STEPS, task.BATCH_SIZE), 0, task.TRAINED
)


def train(scale_by, peak):
    """Return the held-out loss of a training with the learning rate `peak`."""
    tx = optax.chain(scale_by, optax.scale_by_learning_rate(1.0))

    def step(carry, item):
        params, state = carry
        number, batch = item
        gradient = jax.grad(task.loss_fn)(params, images[batch], labels[batch])
        updates, state = tx.update(gradient, state, params)
        rate = peak * (1 - number / task.STEPS)
        updates = jax.tree.map(lambda u: rate * u, updates)
        return (optax.apply_updates(params, updates), state), None

    start = task.init()
    items = jnp.arange(task.STEPS), batches
    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), items)
    return task.loss_fn(params, images[task.TRAINED :], labels[task.TRAINED :])


for name, compressor in {
    "two of 128": efcp_jax.top_k(2 / 128, block_size=128),
    "dense, the reference": efcp_jax.identity(),
}.items():
    scale_by = efcp_jax.scale_by_ggt(task.WINDOW, compressor=compressor)
    losses = jax.jit(jax.vmap(lambda peak, tx=scale_by: train(tx, peak)))(RATES)
    pairs = zip(RATES, losses, strict=True)
    text = ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in pairs)
    print(f"{name:34} loss {text}")

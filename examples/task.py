"""The small task of the numbered examples: a network of one hidden layer on digits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import efcp_jax


STEPS = 200
BATCH_SIZE = 64
WINDOW = 16
HIDDEN = 64
TRAINED = 1400  # the rest is held out


def data() -> tuple[jax.Array, jax.Array]:
    """Return images `(n, 64)` in [0, 1] and labels `(n,)`."""
    images, labels = load_digits(return_X_y=True)
    order = jax.random.permutation(jax.random.key(0), len(images))
    images = jnp.asarray(images / 16, jnp.float32)
    return images[order], jnp.asarray(labels)[order]


def init() -> dict[str, jax.Array]:
    """Return parameters."""
    keys = jax.random.split(jax.random.key(1), 2)
    return {
        "bias": jnp.zeros(HIDDEN),
        "hidden": jax.random.normal(keys[0], (64, HIDDEN)) / 8,
        "output": jax.random.normal(keys[1], (HIDDEN, 10)) / 8,
    }


def logits(params: Any, images: jax.Array) -> jax.Array:
    """Return `(n, 10)` logits."""
    return jnp.tanh(images @ params["hidden"] + params["bias"]) @ params["output"]


def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross entropy."""
    loss = optax.softmax_cross_entropy_with_integer_labels
    return jnp.mean(loss(logits(params, images), labels))


def train(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    """Return parameters and optimizer state of a training of `STEPS` steps.

    The whole loop is one compiled scan: the state has fixed shapes and dtypes.
    """
    images, labels = data()
    batches = jax.random.randint(jax.random.key(2), (STEPS, BATCH_SIZE), 0, TRAINED)

    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(loss_fn)(params, images[batch], labels[batch])
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = init()
    return jax.jit(lambda c: jax.lax.scan(step, c, batches)[0])((start, tx.init(start)))


def held_out(params: Any) -> tuple[float, float]:
    """Return loss and accuracy on what was not trained on."""
    images, labels = (each[TRAINED:] for each in data())
    right = jnp.argmax(logits(params, images), axis=1) == labels
    return float(loss_fn(params, images, labels)), float(jnp.mean(right))


def compare(
    optimizers: dict[str, Callable[[], optax.GradientTransformation]],
) -> dict[str, float]:
    """Train with each optimizer, print what it reaches, and return the losses."""
    losses = {}
    for name, make in optimizers.items():
        params, _ = train(make())
        loss, accuracy = held_out(params)
        size = efcp_jax.memory_report(make(), params).per_parameter
        print(
            f"{name:34} loss {loss:.3f}, accuracy {accuracy:.3f},"
            f" {size:.1f} bytes of state a parameter"
        )
        losses[name] = loss
    return losses


def decay(peak: float) -> optax.Schedule:
    """Return a learning rate that falls to zero."""
    return optax.cosine_decay_schedule(peak, STEPS)

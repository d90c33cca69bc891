"""What all classifiers share: flax models split for training, losses and counts."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax


def split(make: Callable[[nnx.Rngs], nnx.Module]):
    """Return the graph of a model, and the function from a key to its two states.

    Both states are dictionaries: the parameters, and the batch statistics.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key):
        _, params, statistics = nnx.split(make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return params, statistics

    return graph, init


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the loss of every label, in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def sums(logits: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """Return how many labels there are, the sum of losses, and how many are right."""
    return {
        "count": jnp.float32(labels.size),
        "loss": cross_entropy(logits, labels).sum(),
        "accuracy": jnp.sum(logits.argmax(-1) == labels).astype(jnp.float32),
    }

"""What every client trains on, with what, and how far it has to get."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import efcp_jax


STEPS = 40
WINDOW = 8
FEATURES, HIDDEN = 4, 8
# Of sparse rows more entries than by default, as the models are of one or two blocks.
STRUCTURE = {
    "mfac": {},
    "sparse_mfac": {"density": 0.25},
    "low_rank_mfac": {"rank": 2},
    "ggt": {},
    "sparse_ggt": {"density": 0.25},
    "low_rank_ggt": {"rank": 2},
}


def peak(name: str) -> float:
    """Return the learning rate that the README recommends."""
    return 1 / WINDOW if name.endswith("mfac") else 1.0


def make(name: str, learning_rate: Any = None) -> optax.GradientTransformation:
    """Return the optimizer `name`: the one line that differs from another's training.

    The learning rate is by default the recommended one, decaying over the steps.
    """
    if learning_rate is None:
        learning_rate = optax.cosine_decay_schedule(peak(name), STEPS)
    alias = getattr(efcp_jax, name)
    return alias(learning_rate, window_size=WINDOW, **STRUCTURE[name])


def data() -> tuple[jax.Array, jax.Array]:
    """Return inputs, and targets that a small network can learn."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, FEATURES))
    y = np.tanh(x @ np.asarray([[1.0], [-0.5], [0.25], [0.75]]))
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def params() -> dict[str, jax.Array]:
    """Return the parameters of a network with one hidden layer."""
    rng = np.random.default_rng(1)
    shapes = {"hidden": (FEATURES, HIDDEN), "output": (HIDDEN, 1)}
    return {
        key: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
        for key, shape in shapes.items()
    }


def loss(tree: dict[str, jax.Array]) -> jax.Array:
    x, y = data()
    prediction = jnp.tanh(x @ tree["hidden"]) @ tree["output"]
    return jnp.mean((prediction - y) ** 2)


def falls(losses: Any, share: float = 0.1, floor: float = 0.0) -> None:
    """Assert that of the loss above `floor` less than a share is left at the end.

    Without updates all of it is left, and with their sign reversed more than that.
    """
    losses = np.asarray(losses, np.float64)
    assert np.all(np.isfinite(losses))
    assert losses[0] > floor
    assert losses[-1] - floor < share * (losses[0] - floor)

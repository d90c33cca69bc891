"""The six optimizers with small windows, and the trees and runs that tests share."""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import efcp_jax


WINDOW = 3
STEPS = 2 * WINDOW + 1  # the window has wrapped twice

# Powers of two are exact in every dtype that an update or a hyperparameter may have.
LEARNING_RATE = 0.125
STRUCTURE = {
    "mfac": {"window_size": WINDOW},
    "sparse_mfac": {"window_size": WINDOW, "density": 0.25},
    "low_rank_mfac": {"window_size": WINDOW, "rank": 1},
    "ggt": {"window_size": WINDOW},
    "sparse_ggt": {"window_size": WINDOW, "density": 0.25},
    "low_rank_ggt": {"window_size": WINDOW, "rank": 1},
}


# Two of them in a metric, two with values of 8 bits, one with such an error. These are
# of GGT: one of Optax's suites allows 40 steps, which sparse M-FAC just keeps to in
# float32.
VARIANTS = {
    "sparse_ggt-metric": {
        "metric": efcp_jax.diagonal_metric(),
        "value_dtype": jnp.float8_e4m3fn,
    },
    "low_rank_mfac-metric": {"metric": efcp_jax.diagonal_metric(factored=False)},
    "sparse_ggt-int8": {"value_dtype": jnp.int8, "error_dtype": jnp.int8},
}
ALL = [*STRUCTURE, *VARIANTS]


def ridge(name: str) -> str:
    """Return what the optimizer calls the number that is added to its matrix."""
    return "damping" if "mfac" in name else "eps"


def hyperparameters(name: str) -> dict[str, float]:
    return {"learning_rate": LEARNING_RATE, ridge(name): 0.25}


@functools.cache
def make(name: str, **given: Any) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer `name`; always the same one, so that it compiles once."""
    alias = name.split("-")[0]
    variant = VARIANTS.get(name, {})
    arguments = {**hyperparameters(name), **STRUCTURE[alias], **variant, **given}
    return getattr(efcp_jax, alias)(**arguments)


def params(dtype: Any = jnp.float32) -> dict:
    rng = np.random.default_rng(1)
    shapes = {"bias": (4,), "kernel": (4, 8)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def gradients(like: Any, steps: int = STEPS, dtype: Any = None, seed: int = 0) -> list:
    """Return `steps` random gradients of the tree `like`."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        real = rng.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            real = real + 1j * rng.normal(size=leaf.shape)
        return jnp.asarray(real, dtype or leaf.dtype)

    return [jax.tree.map(one, like) for _ in range(steps)]


def run(tx: Any, model: Any, each: list, state: Any = None, **extra: Any) -> tuple:
    """Return the updates and the last state of one compiled run."""

    def step(state, gradient):
        return tx.update(gradient, state, model, **extra)[::-1]

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    scan = jax.jit(lambda state: lax.scan(step, state, stacked)[::-1])
    return scan(tx.init(model) if state is None else state)


@functools.cache
def plain_run(name: str, dtype: Any = jnp.float32) -> tuple:
    """Return the updates and the last state of the optimizer `name` by itself."""
    model = params(dtype)
    return run(make(name), model, gradients(model))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Assert that all leaves agree, next to the largest entry of each."""

    def check(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        wide = np.complex128 if np.iscomplexobj(b) else np.float64
        a, b = a.astype(wide), b.astype(wide)
        scale = np.max(np.abs(b), initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(check, actual, expected)


def assert_equal(actual: Any, expected: Any) -> None:
    """Assert that all leaves are equal, bit by bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def types(tree: Any) -> list:
    """Return shape, dtype, weak type and sharding of every leaf."""
    return [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]

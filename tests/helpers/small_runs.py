"""Runs of one small model over chosen gradients, which must stay finite throughout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efcp_jax


F32 = np.finfo(np.float32)
D = 12
SHAPE = (3, 4)
KINDS = {"mfac": efcp_jax.scale_by_mfac, "ggt": efcp_jax.scale_by_ggt}
# All of these keep the whole gradient.
LOSSLESS = {
    "dense": efcp_jax.identity(),
    "sparse": efcp_jax.top_k(1.0),
    "low_rank": efcp_jax.low_rank(100),
}
LOSSY = {
    "bf16": efcp_jax.identity(value_dtype=jnp.bfloat16),
    "one": efcp_jax.top_k(1e-9),
    "f16-blocks": efcp_jax.top_k(0.3, block_size=5, value_dtype=jnp.float16),
    "rank-1": efcp_jax.low_rank(1),
}


@functools.cache
def jitted(kind: str, name: str, window: int):
    """Return `init` and a compiled `update(gradient, state, strength)`."""
    compressor = {**LOSSY, **LOSSLESS}[name]

    def update(gradient, state, strength):
        # Traced, as by a schedule: 0 and below can be reached only so.
        tx = KINDS[kind](window, lambda count: strength, compressor=compressor)
        return tx.update(gradient, state)

    init = KINDS[kind](window, 1.0, compressor=compressor).init
    return init, jax.jit(update)


def run(kind, name, window, gradients, strength):
    """Return all updates, flat float64, and the last state."""
    init, update = jitted(kind, name, window)
    state, updates = init(jnp.zeros_like(jnp.asarray(gradients[0]))), []
    for gradient in gradients:
        value, state = update(jnp.asarray(gradient), state, jnp.float32(strength))
        assert np.all(np.isfinite(np.asarray(value, np.float64)))
        updates.append(np.asarray(value, np.float64).ravel())
    for leaf in jax.tree.leaves(state):
        assert np.all(np.isfinite(np.asarray(leaf, np.float64)))
    return updates, state


def random(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return list(rng.normal(size=(count, *SHAPE)).astype(np.float32))


def vectors(gradients) -> list[np.ndarray]:
    return [np.asarray(gradient, np.float64).ravel() for gradient in gradients]


every_lossless = pytest.mark.parametrize("name", LOSSLESS)
every_kind = pytest.mark.parametrize("kind", KINDS)

"""What steps make of entries that are not finite if they do not skip them.

Which entries a NaN reaches is the platform's own: kernels for TPUs carry one to another
place than gathers do. That it reaches the update, the Gram matrix and the error in the
step it comes, and stays, is what users may rely on. An infinity is an overflow: where
there is an error to carry it becomes the largest number, and the Gram matrix tells.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efcp_jax


SHAPES = {"bias": (8,), "kernel": (24, 40)}
COMPRESSORS = {
    "identity": efcp_jax.identity(),
    "identity-bf16": efcp_jax.identity(value_dtype=jnp.bfloat16),
    "top_k": efcp_jax.top_k(0.1),
    "top_k-tiles-bf16": efcp_jax.top_k(0.25, block_size=8, value_dtype=jnp.bfloat16),
    "low_rank": efcp_jax.low_rank(2),
}


def finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def gradient(value=None):
    rng = np.random.default_rng(0)
    made = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    if value is not None:
        made["kernel"][3, 5] = value
    return made


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_is_not_skipped_is_seen_on_every_platform(name, platform, pretend):
    pretend(platform)
    compressor = COMPRESSORS[name]
    tx = efcp_jax.scale_by_mfac(4, 0.1, compressor=compressor, skip_nonfinite=False)
    step = jax.jit(tx.update)
    first, fine = step(gradient(), tx.init(gradient()))
    assert finite((first, fine))
    for value in (np.nan, np.inf, -np.inf):
        update, state = step(gradient(value), fine)
        later, after = step(gradient(), state)
        saturates = np.isinf(value) and not compressor.lossless
        assert finite(update) == saturates
        assert finite(later) == saturates
        assert finite(state.error) == (saturates or compressor.lossless)
        assert not finite(state.gram)
        assert (state.skipped, after.skipped) == (0, 0)

"""The runs whose states version 0.1.0 saved, for the test that restores them.

python old_runs.py FOLDER       with that version installed, writes them anew
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import efcp_jax


WINDOW = 3
STEPS = 5  # the window has wrapped
HALF = jnp.bfloat16

SHAPES = {"bias": (24,), "gain": (), "kernel": (3, 8, 24), "other": (24, 24)}

# What were the defaults of 0.1.0.
MFAC, GGT = {"damping": 1e-2}, {"eps": 1e-4}
WIDE = {"value_dtype": "float32", "error_dtype": "float32"}

# Every representation and storage that states of 0.1.0 can hold.
RUNS = {
    "dense": efcp_jax.mfac(0.1, WINDOW, **MFAC),
    "dense-half": efcp_jax.ggt(0.1, WINDOW, value_dtype=HALF, **GGT),
    "one-block": efcp_jax.sparse_mfac(
        0.1, WINDOW, 0.02, block_size=4096, **WIDE, **MFAC
    ),
    "words": efcp_jax.sparse_mfac(
        0.1, WINDOW, 0.02, block_size=512, value_dtype=HALF, error_dtype=HALF, **MFAC
    ),
    "small-blocks": efcp_jax.sparse_ggt(
        0.1, WINDOW, 0.05, block_size=40, **WIDE, **GGT
    ),
    "small-blocks-half": efcp_jax.sparse_mfac(
        0.1,
        WINDOW,
        2 / 128,
        block_size=128,
        value_dtype=HALF,
        error_dtype="float32",
        **MFAC,
    ),
    "low-rank": efcp_jax.low_rank_mfac(0.1, WINDOW, 2, **MFAC),
    "low-rank-half": efcp_jax.low_rank_ggt(0.1, WINDOW, 2, value_dtype=HALF, **GGT),
    "block-diagonal": efcp_jax.low_rank_mfac(
        0.1, WINDOW, 2, block_diagonal=True, **MFAC
    ),
}


def params() -> dict:
    """Return the parameters, zeros."""
    return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def gradient(step: int) -> dict:
    """Return the gradient of a step, the same on every machine."""
    rng = np.random.default_rng(step)
    return {n: jnp.asarray(rng.normal(size=s), "float32") for n, s in SHAPES.items()}


def main(folder: pathlib.Path) -> None:
    """Save the state before the last step of every run, and its last update."""
    saved = {}
    for name, tx in RUNS.items():
        state, update = tx.init(params()), jax.jit(tx.update)
        for step in range(STEPS):
            _, state = update(gradient(step), state, params())
        updates, _ = update(gradient(STEPS), state, params())
        saved[name] = {"state": state, "updates": updates}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), saved)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

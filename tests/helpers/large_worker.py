"""Compile steps of billions of parameters for a TPU v5e or an H100 that is not here.

Run by `compiling.worker` for tpu or cuda; prints the gigabytes of temporaries of each
case, in JSON.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import programs

import efcp_jax


BYTES = efcp_jax.scale_by_ggt(
    16,
    compressor=efcp_jax.top_k(1 / 128, block_size=128, value_dtype=jnp.int8),
    error_dtype=jnp.int8,
)
LARGE_BLOCKS = efcp_jax.sparse_mfac(1.0, 16, density=0.01, block_size=4096)
CASES = {
    # What 16 GB hold beside the gradient, in which the update is returned.
    "tpu": {"bytes": (BYTES, [(2**31 + 2**20,)])},
    "cuda": {
        "default": (efcp_jax.sparse_ggt(1.0, 16), [(3 * 2**30,)]),
        "nine leaves": (efcp_jax.sparse_ggt(1.0, 16), [(2**28,)] * 9),
        "blocks of 4096": (LARGE_BLOCKS, [(3 * 2**30,)]),
        "low rank": (efcp_jax.low_rank_ggt(1.0, 16), [(2**15, 2**17)]),
    },
}


def temporaries(tx, shapes, place):
    """Return the gigabytes of temporaries of a step on gradients in bfloat16."""
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    gradients = [struct(shape, jnp.bfloat16) for shape in shapes]
    state = jax.eval_shape(tx.init, gradients)
    state = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype), state)
    step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=(0, 1))
    memory = step.lower(gradients, state).compile().memory_analysis()
    return memory.temp_size_in_bytes / 1e9


def main(platform):
    place = programs.sharding(platform)
    cases = CASES[platform]
    print(json.dumps({name: temporaries(*cases[name], place) for name in cases}))


if __name__ == "__main__":
    main(sys.argv[1])

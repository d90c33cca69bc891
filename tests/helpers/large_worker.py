"""Compile steps of billions of parameters for a TPU v5e or an H100 that is not here.

    python large_worker.py tpu|cuda

Prints the gigabytes of temporaries of each case, in JSON.
"""

import json
import os
from pathlib import Path
import sys


# Devices are described, not looked for.
os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

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
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    gradients = [struct(jax.ShapeDtypeStruct(s, jnp.bfloat16)) for s in shapes]
    state = jax.tree.map(struct, jax.eval_shape(tx.init, gradients))
    step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=(0, 1))
    memory = step.lower(gradients, state).compile().memory_analysis()
    return memory.temp_size_in_bytes / 1e9


def main(platform):
    place = programs.sharding(platform)
    cases = CASES[platform]
    print(json.dumps({name: temporaries(*cases[name], place) for name in cases}))


if __name__ == "__main__":
    main(sys.argv[1])

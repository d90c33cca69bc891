"""Clipping, schedules, masks and partitions of Optax around a preconditioner.

python examples/04_chain_with_optax.py
"""

import jax
import optax
import task

import efcp_jax


matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
labels = lambda params: jax.tree.map(
    lambda x: "matrix" if x.ndim > 1 else "vector", params
)
warm = optax.warmup_cosine_decay_schedule(0.0, 1.0, task.STEPS // 10, task.STEPS)
sparse = lambda rate: efcp_jax.sparse_ggt(rate, task.WINDOW)

task.compare(
    {
        "clipped, with warm-up": lambda: optax.chain(
            optax.clip_by_global_norm(1.0), sparse(warm)
        ),
        "no decay of vectors": lambda: efcp_jax.sparse_ggt(
            task.decay(1.0), task.WINDOW, weight_decay=1e-3, mask=matrices
        ),
        "vectors by Adam": lambda: optax.partition(
            {"matrix": sparse(task.decay(1.0)), "vector": optax.adam(4e-3)}, labels
        ),
        "dense, the reference": lambda: efcp_jax.ggt(task.decay(1.0), task.WINDOW),
    }
)

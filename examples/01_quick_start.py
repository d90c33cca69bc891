"""Replace one line: full-matrix Adagrad on compressed gradients, beside AdamW.

python examples/01_quick_start.py
"""

import optax
import task

import efcp_jax


task.compare(
    {
        "AdamW": lambda: optax.adamw(task.decay(4e-3)),
        "sparse GGT": lambda: efcp_jax.sparse_ggt(task.decay(1.0), task.WINDOW),
        "dense GGT, the reference": lambda: efcp_jax.ggt(task.decay(1.0), task.WINDOW),
    }
)

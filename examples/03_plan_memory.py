"""How many bytes a state takes, for a model that does not fit this machine.

python examples/03_plan_memory.py
"""

from typing import Any

import jax
import jax.numpy as jnp

import efcp_jax


WIDTH = 4096
params: Any = {
    "embedding": jax.ShapeDtypeStruct((32_000, WIDTH), jnp.bfloat16),
    "attention": jax.ShapeDtypeStruct((32, WIDTH, 4 * WIDTH), jnp.bfloat16),
    "mlp": jax.ShapeDtypeStruct((32, WIDTH, 8 * WIDTH), jnp.bfloat16),
}
half = jnp.bfloat16  # as sparse rows
optimizers = {
    "sparse GGT, m = 16": efcp_jax.sparse_ggt(1.0, 16),
    "sparse GGT, m = 64": efcp_jax.sparse_ggt(1.0, 64),
    "sparse M-FAC, m = 1024, 1 of 128": efcp_jax.sparse_mfac(1e-3, 1024, 1 / 128),
    "low-rank GGT, m = 16, rank 4": efcp_jax.low_rank_ggt(
        1.0, 16, 4, value_dtype=half, error_dtype=half
    ),
}
for name, tx in optimizers.items():
    report = efcp_jax.memory_report(tx, params)
    print(
        f"{name:34} {report.total / 1e9:6.1f} GB, {report.per_parameter:5.2f} bytes a"
        f" parameter, {report.dense_window / report.total:6.1f} times less than dense"
    )
print(efcp_jax.memory_report(optimizers["sparse GGT, m = 16"], params))

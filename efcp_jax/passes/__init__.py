"""Work over a window and over vectors as long as the gradient, one file a platform.

| file | what |
|---|---|
| `tiles` | small blocks: select, residual, inner, combine, by each platform's form |
| `reference` | what these must compute, as plainly as it can be written |
| `cpu`, `gpu`, `tpu` | their forms; `matching` and `runs` are what some of them share |
| `large` | the same for blocks of more than 256 entries |
| `cpu_feed`, `tpu_feed` | error feedback in one go where that is less work |
| `bisection` | the largest entries of large blocks |
| `entries` | how entries are stored |
| `insert`, `add`, `overwrite` | writing where an array lies |
| `finite` | whether a gradient is |
| `scale` | the largest magnitude of a row, and the power of two above it |
"""

from efcp_jax.passes.add import add as add
from efcp_jax.passes.finite import all_finite as all_finite, finite as finite
from efcp_jax.passes.insert import insert as insert
from efcp_jax.passes.scale import row_scale as row_scale

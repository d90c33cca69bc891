"""Work over a window and over vectors as long as the gradient, by platform.

| file | what |
|---|---|
| `forms` | what passes over sparse rows mean: select, residual, inner, dot, combine |
| `reference` | these as plainly as can be written: what the others must compute |
| `cpu` | loops over a few blocks at a time |
| `gpu` | fused comparisons |
| `tpu`, `tpu_feed`, `tpu_tiles` | kernels for tiles of 128 blocks; else comparisons |
| `selection` | the largest entries, for all platforms |
| `entries` | how entries are stored |
| `arrays` | passes over any array: finite or not, scaled, added to, overwritten |
"""

from efcp_jax.passes.arrays import (
    add as add,
    all_finite as all_finite,
    finite as finite,
    insert as insert,
    of_stacked as of_stacked,
    on_cpus as on_cpus,
    overwrite as overwrite,
    row_scale as row_scale,
    subtract_products as subtract_products,
    turned_together as turned_together,
)

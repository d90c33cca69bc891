"""Representations of a gradient, one file each; `base` holds what they share.

| compressor | one row | memory of a window, bytes a parameter |
|---|---|---|
| `identity` | the gradient itself | 4 m |
| `top_k` | values and block-local offsets | m density (4 + 1, 2 or 4) |
| `low_rank` | two thin factors a matrix | 4 m r (rows + cols) / (rows cols) |
| `by_label` | a row of another compressor for each label | the sum over the labels |
"""

from efcp_jax.compressors.base import (
    ROW_AXIS as ROW_AXIS,
    Compressor as Compressor,
    Space as Space,
    each_gram as each_gram,
    of_grams as of_grams,
    scoped as scoped,
)
from efcp_jax.compressors.by_label import ByLabel as ByLabel, by_label as by_label
from efcp_jax.compressors.identity import Identity as Identity, identity as identity
from efcp_jax.compressors.low_rank import LowRank as LowRank, low_rank as low_rank
from efcp_jax.compressors.top_k import TopK as TopK, top_k as top_k

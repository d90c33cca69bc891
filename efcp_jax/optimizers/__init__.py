"""The six optimizers, each a chain that ends in the learning rate."""

from efcp_jax.optimizers._ggt import (
    ggt as ggt,
    low_rank_ggt as low_rank_ggt,
    sparse_ggt as sparse_ggt,
)
from efcp_jax.optimizers._mfac import (
    low_rank_mfac as low_rank_mfac,
    mfac as mfac,
    sparse_mfac as sparse_mfac,
)

"""The six optimizers, each a chain that ends in the learning rate."""

from efcp_jax.optimizers.ggt import ggt as ggt
from efcp_jax.optimizers.low_rank_ggt import low_rank_ggt as low_rank_ggt
from efcp_jax.optimizers.low_rank_mfac import low_rank_mfac as low_rank_mfac
from efcp_jax.optimizers.mfac import mfac as mfac
from efcp_jax.optimizers.sparse_ggt import sparse_ggt as sparse_ggt
from efcp_jax.optimizers.sparse_mfac import sparse_mfac as sparse_mfac

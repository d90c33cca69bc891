r"""Full-matrix preconditioners with compressed gradients, for Optax.

M-FAC (natural gradient with the damped empirical Fisher matrix) and GGT (full-matrix
Adagrad) keep a sliding window of past gradients. Here every gradient is compressed
before it enters the window, and error feedback adds what was dropped to the next one.

Symbols, used alike in code, docs and tests:

| symbol | meaning |
|---|---|
| $d$ | number of parameters |
| $m$ | window size, the number of rows kept |
| $k$, $B$ | kept entries of each block, block size |
| $r$ | rank |
| $c_t$, $e_t$ | compressed gradient, error |
| $G$ | the $m \times d$ window, one row for each past $c_t$ |
| $K$ | $G G^T$, the Gram matrix |
| $\lambda$, $\epsilon$ | damping of M-FAC, eps of GGT |
| $j$, $e_j$ | slot of the newest row, its unit vector |

Floors of the code; imports point down only:

    diagnostics  memory  sharding      read states; nothing imports them
    _reshard                           the arrays of a state on other devices
    _positions                         what each entry of them stands for
    optimizers                         chains that end in the learning rate
    transforms                         what users call, and what it computes
    step                               one step on one device
    protocol  states                   a step as an Optax transformation
    feedback  window                   error + gradient -> row; the last m rows
    gram  preconditioners              m x m only
    _system                            their solution, kept from step to step
    _cholesky                          their factorisation
    compressors                        one file a representation
    _description                       a state that is described, not made
    placement                          which device holds what
    layout                             a tree as real matrices
    _boxes  _branch  _dot              arrays out of boxes, overwritten, multiplied
"""

from efcp_jax import sharding as sharding
from efcp_jax.compressors import (
    identity as identity,
    low_rank as low_rank,
    top_k as top_k,
)
from efcp_jax.diagnostics import diagnostics as diagnostics
from efcp_jax.memory import memory_report as memory_report
from efcp_jax.optimizers import (
    ggt as ggt,
    low_rank_ggt as low_rank_ggt,
    low_rank_mfac as low_rank_mfac,
    mfac as mfac,
    sparse_ggt as sparse_ggt,
    sparse_mfac as sparse_mfac,
)
from efcp_jax.states import (
    ErrorFeedbackState as ErrorFeedbackState,
    ScaleByGgtState as ScaleByGgtState,
    ScaleByMfacState as ScaleByMfacState,
)
from efcp_jax.transforms import (
    error_feedback as error_feedback,
    scale_by_ggt as scale_by_ggt,
    scale_by_mfac as scale_by_mfac,
)


__version__ = "0.1.0"

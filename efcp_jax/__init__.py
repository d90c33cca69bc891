r"""Full-matrix preconditioners with compressed gradients, for Optax.

M-FAC (natural gradient with the damped empirical Fisher matrix) and GGT (full-matrix
Adagrad) keep a sliding window of past gradients. Here every gradient is compressed
before it enters the window, and error feedback adds what was dropped to the next one.

| name | what it is |
|---|---|
| `mfac`, `sparse_mfac`, `low_rank_mfac` | M-FAC with momentum, weight decay and rate |
| `ggt`, `sparse_ggt`, `low_rank_ggt` | GGT with momentum, weight decay and rate |
| `scale_by_mfac`, `scale_by_ggt` | the preconditioners alone, for `optax.chain` |
| `error_feedback` | compression with error feedback alone, in front of any optimizer |
| `identity`, `top_k`, `low_rank` | compressors, for the argument `compressor` |
| `by_label` | a compressor that uses others, one for each label of parameters |
| `diagonal_metric` | a metric: what gradients are measured in |
| `in_metric` | any Optax transformation in a metric |
| `memory_report` | bytes of every field of an optimizer's state, without allocating |
| `diagnostics` | error, row norms, window fill, spectrum and rank, from a state |
| `monitor` | figures of the last step of any optimizer, in its state |
| `inverse_fisher_product` | any tree times a trained M-FAC's inverse Fisher matrix |
| `sharding` | module: where the state lives on many devices, and how to move it |
| `ScaleByMfacState`, `ScaleByGgtState`, `ErrorFeedbackState`, `MonitorState` | states |

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

Rooms of the house, from the roof to the cellar; imports point down only:

    sharding                            states on many devices, for users
    reports                             diagnostics and memory, from states
    optimizers                          chains that end in the learning rate
    transforms                          what users chain, and its states
    step                                compress, insert, inner, solve, combine
    protocol                            a step as an Optax transformation
    feedback                            the gradient's way in: metric, error, window
    preconditioners                     m x m only: M-FAC, GGT, Gram matrix, Cholesky
    compressors                         what a row is, one representation a file
    metrics                             what gradients are measured in
    passes                              work over a window, by platform
    devices                             which device holds what
    quantized                           errors of 8 bits
    numerics                            products, casts and scales
    experimental                        what JAX may lack
"""

from efcp_jax import sharding as sharding
from efcp_jax.compressors import (
    by_label as by_label,
    identity as identity,
    low_rank as low_rank,
    top_k as top_k,
)
from efcp_jax.metrics import diagonal_metric as diagonal_metric
from efcp_jax.optimizers import (
    ggt as ggt,
    low_rank_ggt as low_rank_ggt,
    low_rank_mfac as low_rank_mfac,
    mfac as mfac,
    sparse_ggt as sparse_ggt,
    sparse_mfac as sparse_mfac,
)
from efcp_jax.reports.diagnostics import diagnostics as diagnostics
from efcp_jax.reports.inverse import (
    inverse_fisher_product as inverse_fisher_product,
)
from efcp_jax.reports.memory import memory_report as memory_report
from efcp_jax.reports.monitor import MonitorState as MonitorState, monitor as monitor
from efcp_jax.transforms import (
    ErrorFeedbackState as ErrorFeedbackState,
    ScaleByGgtState as ScaleByGgtState,
    ScaleByMfacState as ScaleByMfacState,
    error_feedback as error_feedback,
    in_metric as in_metric,
    scale_by_ggt as scale_by_ggt,
    scale_by_mfac as scale_by_mfac,
)


__version__ = "0.1.0"

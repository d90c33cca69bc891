r"""Coefficients of the update from the Gram matrix: m x m work, whatever d is.

The compressed gradient $c_t$ is row $j$ of the window, $c_t = G^T e_j$, so with
$K = G G^T$ (push-through identity)

$$(\lambda I + G^T G / m)^{-1} c_t = G^T (\lambda I + K / m)^{-1} e_j, \qquad
((G^T G)^{1/2} + \epsilon I)^{-1} c_t = G^T (K^{1/2} + \epsilon I)^{-1} e_j.$$

No large numbers are subtracted, unlike in the form $x / \lambda - G^T(\ldots)$.

Rows come scaled: $G = S \hat G$ with $S = \mathrm{diag}(s)$, so both functions take
$\hat K = \hat G \hat G^T$, shape `(m, m)`, and $s$, shape `(m,)`, 0 for empty slots;
they return $S w$, and never form a square of $s$: rows from 1e-30 to 1e30 share a
window.

Degenerate windows have stated results, finite ones. Zero rows, empty slots included,
have no part in the update, and for a zero newest row it is zero. Where rows depend on
each other to within rounding, the update is the limit of the exact one, which for a
damping or eps of 0 is the pseudo-inverse; schedules below 0 count as 0. One gradient
$c$ in $t$ of $m$ slots gives $c / (\lambda + |c|^2 t / m)$ and
$c / (|c| \sqrt{t} + \epsilon)$. Numbers that the hardware flushes are zeros, and what
would overflow is clipped.
"""

from efcp_jax.preconditioners.ggt import ggt_coefficients as ggt_coefficients
from efcp_jax.preconditioners.mfac import mfac_coefficients as mfac_coefficients

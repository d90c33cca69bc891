"""What goes on inside an optimizer, computed from its state on request."""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from efcp_jax import quantized
from efcp_jax.metrics import Factored, MetricState
from efcp_jax.numerics import widest
from efcp_jax.reports import only_state
from efcp_jax.transforms import ErrorFeedbackState


def diagnostics(state: Any) -> dict[str, chex.ArrayTree]:
    r"""Return the figures that tell whether a preconditioner is healthy.

    It is pure, and costs an eigendecomposition of an `(m, m)` matrix and one pass over
    the error: call it every so many steps, under `jax.jit`.

    Args:
        state: The state of any optimizer that contains exactly one of this package's
            transformations, however deeply chained, masked or wrapped.

    Returns:
        A dictionary of arrays, those that the transformation has:

        * `count`, `skipped`: updates so far, and those skipped because an entry of the
          gradient was not finite, int32.
        * `error_norm`: $|e|$, and `error_ratio`: $|e|^2 / (|e|^2 + |c|^2)$ with the
          newest compressed gradient, in [0, 1). Near 0 nothing is dropped; near 1 the
          compressor keeps almost nothing of what has accumulated.
        * `row_norm`: $|c_t|$ of the newest row.
        * `window_fill`: share of the slots that hold a row, in [0, 1].
        * `spectrum`: eigenvalues of $K = G G^T$, the squared singular values of the
          window, ascending, shape `(m,)`. It overflows for rows above 1e19.
        * `effective_rank`: $\exp$ of the entropy of the normalised spectrum, between 1
          and m; 0 for an empty window.
        * `gradient_rms`: root of the mean of the moments of a diagonal metric over all
          parameters, and `metric_spread`: standard deviation of $D$, in [0, 1). Near 0
          the metric is flat; near 1 few entries have most of the gradient.

        For a block-diagonal compressor `spectrum` and `effective_rank` are trees of
        arrays, `(g, m)` and `(g,)` for each group of g leaves.

    Raises:
        ValueError: `state` contains none of this package's states, or several.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp
        >>> tx = efcp_jax.sparse_mfac(0.1, window_size=4, density=0.5)
        >>> params = jnp.zeros(4)
        >>> _, state = tx.update(jnp.array([2., 1., 1., 2.]), tx.init(params), params)
        >>> ratio = efcp_jax.diagnostics(state)["error_ratio"]  # 2 / (2 + 8)
        >>> print(f"{ratio:.3f}")
        0.200

    References:
        Roy and Vetterli, The effective rank: a measure of effective dimensionality,
        EUSIPCO 2007
    """
    inner = only_state(state)
    result: dict[str, Any] = {"count": inner.count, "skipped": inner.skipped}
    if inner.error is not None:
        error = quantized.load(inner.error)
        dtype = widest(*(leaf.dtype for leaf in jax.tree.leaves(error)))
        result["error_norm"], _ = direction(error, dtype)
    if inner.metric is not None:
        mean, spread = _of_metric(inner.metric)
        result |= {"gradient_rms": mean, "metric_spread": spread}
    if isinstance(inner, ErrorFeedbackState):
        return result
    window, size = inner.window, inner.window.scale.shape[0]
    newest = (window.slot - 1) % size
    squared = sum(
        jnp.sum(jnp.diagonal(gram, axis1=-2, axis2=-1)[..., newest])
        for gram in jax.tree.leaves(inner.gram)
    )
    result["row_norm"] = window.scale[newest] * jnp.sqrt(squared)
    if inner.error is not None:
        both = jnp.hypot(result["error_norm"], result["row_norm"])
        share = result["error_norm"] / jnp.where(both > 0, both, 1)
        result["error_ratio"] = share**2
    result["window_fill"] = window.filled.astype(jnp.float32) / size

    def spectrum(gram: jax.Array) -> jax.Array:
        scaled = window.scale[:, None] * gram * window.scale[None]
        return jnp.maximum(jnp.linalg.eigvalsh(scaled), 0)

    # Of one Gram matrix, or of each in a group of them.
    spectra = jnp.vectorize(spectrum, signature="(m,m)->(m)")
    ranks = jnp.vectorize(_effective_rank, signature="(m)->()")
    result["spectrum"] = jax.tree.map(spectra, inner.gram)
    result["effective_rank"] = jax.tree.map(ranks, result["spectrum"])
    return result


def _of_metric(state: MetricState) -> tuple[jax.Array, jax.Array]:
    r"""Return $\sqrt{\bar v}$ and $\sqrt{1 - (\overline{\sqrt v})^2 / \bar v}$."""
    dtype, totals, count = state.mean.dtype, [jnp.zeros((2,), state.mean.dtype)], 0
    known = jnp.where(state.mean > 0, state.mean, 1)
    is_factored = lambda node: isinstance(node, Factored)
    for kept in jax.tree.leaves(state.moments, is_leaf=is_factored):
        parts = [x.astype(dtype) / known for x in jax.tree.leaves(kept)]
        alike = len(parts[0]) if is_factored(kept) else 1  # of leaves that are alike
        parts = [x.reshape(alike, -1) for x in parts]
        squares, roots = jnp.mean(parts[0], 1), jnp.mean(jnp.sqrt(parts[0]), 1)
        if is_factored(kept):  # the mean of a product of factors is that of the means
            roots *= jnp.mean(jnp.sqrt(parts[1]), 1)
            roots /= jnp.sqrt(jnp.where(squares > 0, squares, 1))
        size = math.prod(part.shape[1] for part in parts)
        totals.append(float(size) * jnp.stack([jnp.sum(squares), jnp.sum(roots)]))
        count += size * alike
    squares, roots = functools.reduce(jnp.add, totals) / float(max(count, 1))
    share = roots**2 / jnp.where(squares > 0, squares, 1)
    spread = jnp.where(squares > 0, jnp.sqrt(jnp.maximum(1 - share, 0)), 0)
    return jnp.sqrt(state.mean), spread


def _effective_rank(spectrum: jax.Array) -> jax.Array:
    total = jnp.sum(spectrum)
    share = spectrum / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share))
    return jnp.where(total > 0, jnp.exp(entropy), 0)


def direction(tree: chex.ArrayTree, dtype: Any) -> tuple[jax.Array, list[jax.Array]]:
    """Return the Euclidean norm of `tree` in `dtype`, and the leaves over it.

    No square leaves the range, and on a mesh every leaf is added up where it lies.
    """
    leaves = []
    for leaf in map(jnp.asarray, jax.tree.leaves(tree)):
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        wide = widest(dtype, jnp.complex64) if is_complex else dtype
        leaves.append(leaf.astype(wide))
    zero = jnp.zeros((), dtype)
    peak = jnp.max(jnp.stack([zero, *(jnp.max(jnp.abs(x), initial=0) for x in leaves)]))
    over = lambda leaves, by: [x / jnp.where(by > 0, by, 1) for x in leaves]
    leaves = over(leaves, peak)
    length = jnp.sqrt(sum((jnp.sum(jnp.abs(x) ** 2) for x in leaves), zero))
    return peak * length, over(leaves, length)

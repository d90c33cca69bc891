"""The same preconditioner on sparse, low-rank and mixed rows, and in a metric.

`by_label` gives matrices and vectors representations of their own, with one Gram matrix
over all of them. A metric evens out entries of different size first.

    python examples/02_choose_a_compressor.py
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import optax
import task

import efcp_jax


def kinds(params):
    """Return which compressor each leaf goes to."""
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "rest", params)


COMPRESSORS = {
    "two of 128": efcp_jax.top_k(2 / 128, block_size=128),
    "one of 128": efcp_jax.top_k(1 / 128, block_size=128),
    "rank 4": efcp_jax.low_rank(4),
    "rank 4, and vectors whole": efcp_jax.by_label(
        {"matrix": efcp_jax.low_rank(4), "rest": efcp_jax.identity()}, kinds
    ),
}


def ggt(compressor: Any, metric: Any = None) -> optax.GradientTransformation:
    """Return GGT with a learning rate behind."""
    return optax.chain(
        efcp_jax.scale_by_ggt(task.WINDOW, compressor=compressor, metric=metric),
        optax.scale_by_learning_rate(task.decay(1.0)),
    )


rows: dict[str, Callable[[], optax.GradientTransformation]] = {
    name: functools.partial(ggt, compressor) for name, compressor in COMPRESSORS.items()
}
rows["two of 128, in a metric"] = functools.partial(
    ggt, COMPRESSORS["two of 128"], efcp_jax.diagonal_metric()
)
rows["dense, the reference"] = functools.partial(ggt, efcp_jax.identity())
task.compare(rows)

"""How many bytes an optimizer's state takes, without allocating any."""

import itertools
import math
from typing import Any, NamedTuple

import chex
import jax
from jax.tree_util import GetAttrKey, SequenceKey
import optax

from efcp_jax import _validate
from efcp_jax.reports import own_states


class MemoryReport(NamedTuple):
    """Bytes of an optimizer's state; `str()` gives a table.

    Attributes:
        fields: Bytes of each array of the state, or of each tree of them, by its path.
        total: Sum of `fields`.
        parameters: Number of parameters.
        per_parameter: `total` over `parameters`.
        dense_window: Bytes of an uncompressed float32 window of the same size; 0 if
            the optimizer has no window.
        adam: Bytes of Adam's state for the same parameters.
    """

    fields: dict[str, int]
    total: int
    parameters: int
    per_parameter: float
    dense_window: int
    adam: int

    def __str__(self) -> str:
        """Return the report as a table."""
        rows = [*self.fields.items(), ("total", self.total)]
        rows += [("dense float32 window", self.dense_window), ("Adam", self.adam)]
        width = max(len(name) for name, _ in rows)
        count = max(self.parameters, 1)
        lines = [f"{'':{width}}  {'bytes':>16}  {'a parameter':>11}"]
        lines += [f"{n:{width}}  {b:16,}  {b / count:11.2f}" for n, b in rows]
        return "\n".join(lines)


def memory_report(
    tx: optax.GradientTransformation, params: chex.ArrayTree
) -> MemoryReport:
    r"""Count the bytes of the state that `tx.init(params)` would make.

    $\sum_{\mathrm{arrays}} \mathrm{size} \cdot \mathrm{itemsize}$, from
    `jax.eval_shape`: nothing is allocated, so models larger than the machine can be
    planned.

    Args:
        tx: Any gradient transformation; comparisons with a dense window need one that
            contains `scale_by_mfac` or `scale_by_ggt`.
        params: Parameters, or `jax.ShapeDtypeStruct`s in their place.

    Returns:
        A `MemoryReport`. Fields of the window are listed one by one; over several
        devices the bytes are those of all devices together.

    Raises:
        TypeError: `tx` is not a gradient transformation.

    Examples:
        >>> import efcp_jax, jax, jax.numpy as jnp
        >>> params = {"w": jax.ShapeDtypeStruct((4096, 1000), jnp.float32)}
        >>> tx = efcp_jax.sparse_mfac(1e-3, window_size=100)
        >>> report = efcp_jax.memory_report(tx, params)
        >>> print(f"{report.per_parameter:.1f} bytes a parameter")
        6.7 bytes a parameter
        >>> print(f"{report.dense_window / report.total:.0f} times less")
        60 times less
    """
    state = jax.eval_shape(_validate.transformation(tx).init, params)
    fields: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        # The names of state fields, without the keys of the parameter tree below them.
        inside = itertools.dropwhile(lambda key: isinstance(key, SequenceKey), path)
        names = itertools.takewhile(lambda key: isinstance(key, GetAttrKey), inside)
        name = ".".join(key.name for key in names) or jax.tree_util.keystr(path)
        fields[name] = fields.get(name, 0) + _bytes(leaf)
    windows = [own.window for own in own_states(state) if hasattr(own, "window")]
    adam = jax.eval_shape(optax.adam(1).init, params)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    total = sum(fields.values())
    return MemoryReport(
        fields=fields,
        total=total,
        parameters=count,
        per_parameter=total / max(count, 1),
        dense_window=sum(4 * count * len(each.scale) for each in windows),
        adam=sum(map(_bytes, jax.tree.leaves(adam))),
    )


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize

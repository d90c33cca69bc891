"""A gradient in a metric: scaled as a whole, or where some of it is read."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.layout import Layout
from efcp_jax.devices.sections import Piece, at_run_time, piece_of
from efcp_jax.metrics.moments import Kind, MetricState, kinds_of
from efcp_jax.numerics import root


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays", "finite", "moments", "share"],
    meta_fields=["layout", "factored"],
)
@dataclasses.dataclass(frozen=True)
class Measured:
    r"""What a metric says of one gradient, as seen by this device.

    $D^{-1/2}$ is made of `arrays`, which are small or kept anyway. `share` is that of
    the mean of the moments.
    """

    layout: Layout
    factored: bool
    arrays: Any
    finite: jax.Array
    moments: Any
    share: jax.Array

    def behind(self, value: Any) -> tuple["Measured", Any]:
        """Return the metric as what is known behind `value`, and `value`.

        Else compilers keep the roots for the way out, as large as the model.
        """
        arrays, value = lax.optimization_barrier((self.arrays, value))
        return dataclasses.replace(self, arrays=arrays), value

    def state(self, mean: jax.Array) -> MetricState:
        """Return what is kept, given the mean of the moments."""
        return MetricState(mean, self.moments)

    @property
    def kinds(self) -> list[tuple[Kind, Any]]:
        """The kinds of leaves, each with what its roots are made of."""
        kinds = kinds_of(self.layout, self.factored)
        return list(zip(kinds, self.arrays, strict=True))

    def scaled(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        r"""Return $D^{-1/2}$ times the leaves of `tree`, in the working dtype."""
        leaves = self.layout.wide(tree)
        for kind, (made_of, *scalars) in self.kinds:
            for place, index in enumerate(kind.indices):
                own = _times_roots(leaves[index], made_of, at_run_time(place), *scalars)
                leaves[index] = own
        return self.layout.treedef.unflatten(leaves)


class Gradient(NamedTuple):
    """A gradient, and the metric that it is to be scaled by, if any."""

    plain: chex.ArrayTree
    measured: Measured | None

    @property
    def tree(self) -> chex.ArrayTree:
        """The gradient in the metric."""
        return self.plain if self.measured is None else self.measured.scaled(self.plain)

    def pieces(self, layout: Layout) -> list[Piece]:
        """Return what lies end to end: sizes, and what makes some of the entries."""
        # The parts of complex leaves lie beside each other, as in matrices.
        if self.measured is None or any(leaf.parts == 2 for leaf in layout.leaves):
            return [piece_of(x, layout.dtype) for x in layout.flat(self.tree)]
        leaves = layout.by_kind([*map(jnp.asarray, jax.tree.leaves(self.plain))])
        return [
            (len(each) * kind.leaf.size, functools.partial(_cut, kind, held, each))
            for (kind, held), each in zip(self.measured.kinds, leaves, strict=True)
        ]


def _cut(
    kind: Kind, roots: Any, leaves: list[jax.Array], low: int, high: int, held: Any
) -> jax.Array:
    """Return entries of the leaves of a kind, laid end to end, in the metric.

    Whole leaves are taken at once, and of others whole rows.
    """
    leaf, made, (made_of, *scalars) = kind.leaf, [], roots
    if kind.bare and high - low == leaf.size:
        inverse = _inverse_roots(made_of, *scalars)
        return held(leaves[0].astype(inverse.dtype) * inverse).reshape(-1)
    rows, cols = leaf.matrix_shape
    while low < high:
        place, first = divmod(low, leaf.size)
        count = (high - low) // leaf.size if first == 0 else 0
        end = leaf.size if count else min(high - place * leaf.size, leaf.size)
        span = slice(first // cols, -(-end // cols))
        which = slice(place, place + max(1, count))
        values = jnp.stack([x.reshape(rows, cols)[span] for x in leaves[which]])
        if kind.factored:
            row, col = (x.reshape(len(x), -1)[which] for x in made_of)
            own = row[:, span, None], col[:, None]
        else:
            own = (made_of[0].reshape(-1, rows, cols)[which, span],)
        inverse = _inverse_roots(own, *scalars)
        scaled = held(values.astype(inverse.dtype) * inverse).reshape(-1)
        start = first - span.start * cols
        low += (taken := max(1, count) * (end - first))
        made.append(scaled[start : start + taken])
    return jnp.concatenate(made)


# Traced once for each kind of leaf, however many of it there are.
@jax.jit
def _times_roots(
    leaf: jax.Array, made_of: Any, place: jax.Array, *scalars: jax.Array
) -> jax.Array:
    """Return a leaf in the metric, of what the roots of its kind are made of."""
    if len(made_of) > 1 or made_of[0].shape != leaf.shape:  # else of one leaf alone
        made_of = [lax.dynamic_index_in_dim(x, place, keepdims=False) for x in made_of]
    if len(made_of) > 1:
        row, col = made_of
        made_of = row[..., None], col[(None,) * row.ndim]
    return leaf * _inverse_roots(made_of, *scalars)


def _inverse_roots(made_of: Any, inverse: jax.Array, shift: jax.Array) -> jax.Array:
    """Return $D^{-1/2}$ of the roots of rows and of columns, or of moments."""
    # Far above all numbers that occur, so that no product overflows.
    limit = float(jnp.finfo(shift.dtype).max) ** 0.25
    near = lambda x: jnp.minimum(x * inverse, limit)
    if len(made_of) > 1:
        row, col = made_of
        return lax.rsqrt(row * near(col) + shift)
    return lax.rsqrt(near(root(made_of[0].astype(shift.dtype))) + shift)

"""The protocol between representations of a gradient and everything above them.

A *compressor* is configuration: an immutable object of Python values. Bound to the
layout of a tree it gives a *space*, which knows all shapes. A space works on three
kinds of values:

* a *vector*: the gradient in working form, an array or a tree of matrices of reals;
* a *row*: a compressed vector, a tree of arrays `(s, k, ...)`;
* a *window*: m rows laid end to end along axis 1, a tree of arrays `(s, m k, ...)`, so
  that a row is a window of one.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax import quantized
from efcp_jax.devices.layout import Layout
from efcp_jax.metrics.measured import Gradient


# Every array of a window lays its rows end to end along this axis, behind the axis that
# is divided among devices and scanned block by block.
ROW_AXIS = 1

# Only its space knows which tree of arrays each of these is. A basis may be None.
Tree: TypeAlias = Any
Vector: TypeAlias = Any
Row: TypeAlias = Any
Basis: TypeAlias = Any
Gram: TypeAlias = Any


class Space(Protocol):
    """The operations of one representation, on trees of one layout.

    In a space that is only ever a part of another, `compress`, `feed` and `inner` may
    be routines, which share their collectives with those of other parts.
    """

    @property
    def layout(self) -> Layout:
        """The leaves of the tree on this device."""
        ...

    @property
    def counts(self) -> Any:
        """How many Gram matrices there are: a number for each array of them.

        None for one over all leaves, and a dictionary for parts.
        """

    def pack(self, tree: Tree) -> Vector:
        """Return `tree` as this device's vector."""

    def unpack(self, vector: Vector) -> Tree:
        """Undo `pack`, in the dtypes of the tree's leaves."""

    def zeros(self) -> Any:
        """Return the zero vector, the zero row, and the first basis."""

    def specs(self) -> Any:
        """Return the `PartitionSpec` of each array that `zeros` returns."""

    def compress(self, vector: Vector, basis: Basis, scaled: bool) -> Any:
        """Return a row, its scale and the next basis: the vector is about scale * row.

        If `scaled`, the scale is the power of two above the largest entry or 0; else 1.
        """

    def feed(self, gradient: Gradient, error, basis, accept, count, scaled) -> Any:
        """Compress `error` plus `gradient`: the row, its scale, error and basis.

        Errors are as they are kept, rounded by `count`, the number of the step. If not
        `accept`, nothing is added, and the error stays as it is.
        """

    def expand(self, row: Row) -> Vector:
        """Return the vector that `row` stands for."""

    def inner(self, window: Row, row: Row) -> Gram:
        """Return G x: this device's share of the inner products of rows and `row`.

        Shape `(m,)`, or `(g, m)` for each number g of `counts`; a sum over all devices
        makes them whole.
        """

    def dot(self, window: Row, vector: Vector) -> Gram:
        """Return G x for a vector, in the shape and the shares of `inner`."""

    def combine(self, window: Row, coefficients: Gram) -> Vector:
        """Return the vector G^T w; the adjoint of `dot` on one device."""

    def update(self, window: Row, coefficients: Gram) -> Tree:
        """Return the tree of `combine`."""

    def mover(self, new: Any) -> Any:
        """Return what moves states of this space to `new`, one of its kind.

        Its methods `vector`, `basis`, `rows` (of a window) and `grams` take and return
        whole arrays of NumPy.
        """


def feed(space: Any, gradient, error, basis, accept, count, scaled) -> Any:
    """Do what `Space.feed` does, by two more operations that `space` has.

    `accumulate` adds the vector of a tree if `accept`, and `residual` takes away the
    scale times that of a row, both within their range.
    """
    before = quantized.load(error, space.layout.dtype)
    total = space.accumulate(gradient.tree, before, accept)
    row, scale, basis = space.compress(total, basis, scaled)
    rest = space.residual(total, row, jnp.where(accept, scale, 0))
    return row, scale, quantized.store(rest, error, accept, count), basis


@runtime_checkable
class Compressor(Protocol):
    """Immutable configuration of a representation."""

    @property
    def lossless(self) -> bool:
        """Whether a row is always the vector itself, whatever its dtype."""
        ...

    def bind(self, layout: Layout) -> Space:
        """Return the space of this representation for trees of `layout`."""
        ...


def scoped(compressor: Compressor, block_diagonal: bool) -> Compressor:
    """Return `compressor` with a Gram matrix for each leaf if `block_diagonal`."""
    if not block_diagonal:
        return compressor
    if not hasattr(compressor, "block_diagonal"):
        raise ValueError(
            "`block_diagonal` must be False for compressors that are not of this"
            f" package, got True for {compressor!r}. Pass `identity()`, `top_k(...)`,"
            " `low_rank(...)`, `by_label(...)`, or `block_diagonal=False`."
        )
    return dataclasses.replace(compressor, block_diagonal=True)  # pyright: ignore


def of_grams(counts: Any, value: Any) -> Any:
    """Return a tree of arrays once for each of the Gram matrices `counts`, stacked.

    A `PartitionSpec` stays as it is.
    """
    if counts is None:
        return value

    def stack(count: int, x: Any) -> Any:
        is_spec = isinstance(x, PartitionSpec)
        return x if is_spec else jnp.broadcast_to(x, (count, *x.shape))

    each = lambda count: jax.tree.map(lambda x: stack(count, x), value)
    return jax.tree.map(each, counts)


def each_gram(function: Callable[..., Any], *, in_turn: bool = False) -> Any:
    """Return `function` of a Gram matrix, and what else there is for it, for all.

    What it is called with, and what it returns, is in the places of the arrays of Gram
    matrices. All are one batch, or follow each other `in_turn`, without a copy of all.
    """

    def call(grams: Any, *others: Any) -> Any:
        if not isinstance(grams, dict):
            return function(grams, *others)
        leaves, treedef = jax.tree.flatten(grams)
        groups = [*zip(leaves, *map(treedef.flatten_up_to, others), strict=True)]
        if in_turn:
            each = lambda arrays: function(*arrays)
            return treedef.unflatten([lax.map(each, group) for group in groups])
        together = jax.tree.map(lambda *x: jnp.concatenate(x), *groups)
        made = jax.vmap(function)(*together)
        ends = np.cumsum([0, *map(len, leaves)])
        parts = [
            jax.tree.map(lambda x, a=a, b=b: x[a:b], made)
            for a, b in itertools.pairwise(ends)
        ]
        return treedef.unflatten(parts)

    return call

"""The protocol between representations of a gradient and everything above them.

A *compressor* is configuration: an immutable object of Python values. Bound to the
layout of a tree it gives a *space*, which knows all shapes. A space works on three
kinds of values:

* a *vector*: the gradient in working form, an array or a tree of matrices of reals;
* a *row*: a compressed vector, a tree of arrays `(s, ...)`;
* a *window*: m rows stacked along axis 1, a tree of arrays `(s, m, ...)`.
"""

from typing import Any, Protocol, TypeAlias, runtime_checkable

import chex
import jax

from efcp_jax.devices.layout import Layout


# Every array of a window stacks its rows along this axis, behind the axis that is
# divided among devices and scanned block by block.
ROW_AXIS = 1

# Only its space knows which tree of arrays each of these is.
Vector: TypeAlias = Any
Row: TypeAlias = Any
Rows: TypeAlias = Any
Basis: TypeAlias = Any
Gram: TypeAlias = Any


class Mover(Protocol):
    """Carries the arrays of a state to another layout, on the host."""

    def vector(self, vector: Vector, /) -> Vector:
        """Return a vector in the new layout."""
        ...

    def basis(self, basis: Basis, /) -> Basis:
        """Return what is carried between steps in the new layout."""
        ...

    def rows(self, rows: Rows, /) -> Rows:
        """Return a window in the new layout."""
        ...


class Space(Protocol):
    """The operations of one representation, on trees of one layout."""

    @property
    def layout(self) -> Layout:
        """The leaves of the tree on this device."""
        ...

    def pack(self, tree: chex.ArrayTree) -> Vector:
        """Return `tree` as this device's vector."""
        ...

    def unpack(self, vector: Vector) -> chex.ArrayTree:
        """Undo `pack`, in the dtypes of the tree's leaves."""
        ...

    def zeros(self) -> tuple[Vector, Row, Basis | None]:
        """Return the zero vector, the zero row, and the first basis (or None)."""
        ...

    def specs(self) -> tuple[Any, Any, Any]:
        """Return the `PartitionSpec` of each array that `zeros` returns."""
        ...

    def accumulate(
        self, tree: chex.ArrayTree, vector: Vector, accept: jax.Array
    ) -> Vector:
        """Return `vector` plus the vector of `tree` if `accept`, within its range."""
        ...

    def compress(
        self, vector: Vector, basis: Basis | None, factor: chex.Numeric = 1.0
    ) -> tuple[Row, Basis | None]:
        """Return the row that stands for `factor * vector`, and the next basis."""
        ...

    def expand(self, row: Row) -> Vector:
        """Return the vector that `row` stands for."""
        ...

    def residual(self, vector: Vector, row: Row, scale: Any) -> Vector:
        """Return `vector` minus `scale` times the vector that `row` stands for."""
        ...

    def inner(self, window: Rows, row: Row) -> Gram:
        """Return G x: this device's share of the inner products of rows and `row`.

        Shape `(m,)`, or for a block-diagonal Gram a tree of such arrays. Summed over
        all devices the shares are the inner products of the whole vectors.
        """
        ...

    def combine(self, window: Rows, coefficients: Gram) -> Vector:
        """Return the vector G^T w; the adjoint of `inner` on one device."""
        ...

    def update(self, window: Rows, coefficients: Gram) -> chex.ArrayTree:
        """Return the tree of `combine`."""
        ...

    def grams(self, value: Any) -> Gram:
        """Return `value` once for each Gram matrix of the representation."""
        ...

    def mover(self, new: Any) -> Mover:
        """Return what moves states of this space to `new`, one of its kind."""
        ...


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

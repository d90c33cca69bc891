r"""Solution of the m x m system, with a factorisation that serves many steps.

Slots are overwritten in turn, so while a run of r slots is overwritten, all other rows
stay. With the run behind the others, the matrix is

$$\begin{pmatrix} A & B \\ B^T & C \end{pmatrix} = L L^T, \qquad
L = \begin{pmatrix} F & \\ W^T & \mathrm{chol}(C - W^T W) \end{pmatrix}, \quad
F F^T = A, \quad W = F^{-1} B,$$

where $F$ is made once a run, and a step replaces one column of $W$: $m^2$ operations
instead of $m^3 / 3$. Rounding errors are those of any Cholesky factorisation, however
many steps it serves. Instead of moving rows, $A$ has the run's of the identity.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from efcp_jax.devices.collectives import vary_like
from efcp_jax.numerics import dot
from efcp_jax.preconditioners import cholesky, pivoted


# Smaller matrices are factorised faster than the kept factor is read.
_SMALLEST = 512
# Slots of a run. A longer one makes F more seldom and the blocks of the run larger.
_RUN = 64
# A relative change of the damping that is not worth a factorisation.
_NEAR = 0.1


class System(NamedTuple):
    r"""The matrix $w_i \hat K_{ij} w_j / n$ with a diagonal of ones."""

    gram: jax.Array  # row by row, shape `(m^2,)`
    weights: jax.Array
    divisor: jax.Array

    @property
    def size(self) -> int:
        """Number of rows m."""
        return len(self.weights)

    def rows(self, start: jax.Array | int, count: int) -> jax.Array:
        """Return `count` rows of the matrix from `start`, shape `(count, m)`."""
        size = self.size
        rows = lax.dynamic_slice_in_dim(self.gram, start * size, count * size)
        weights = lax.dynamic_slice_in_dim(self.weights, start, count)
        rows = weights[:, None] * rows.reshape(count, size) * self.weights[None]
        index = jnp.arange(size)
        diagonal = start + index[:count, None] == index[None]
        return jnp.where(diagonal, 1, rows / self.divisor)


class Kept(NamedTuple):
    """What one step leaves to the next: $F$, $W^T$, and what they were made with."""

    run: jax.Array  # its first slot, int32; -1 if nothing is kept
    damping: jax.Array
    divisor: jax.Array
    factor: cholesky.Factor
    coupling: jax.Array


def empty(size: int, dtype: jax.typing.DTypeLike) -> Kept | None:
    """Return what there is to keep before the first step; None for small matrices."""
    if size < _SMALLEST:
        return None
    made = jax.eval_shape(cholesky.factorise, jax.ShapeDtypeStruct((size,) * 2, dtype))
    return Kept(
        run=jnp.int32(-1),
        damping=jnp.zeros((), dtype),
        divisor=jnp.zeros((), dtype),
        factor=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), made),
        coupling=jnp.zeros((_RUN, size), dtype),
    )


def near(damping: jax.Array, kept: Kept | None) -> jax.Array:
    """Return that of `kept` if near: else all steps that change it factorise."""
    if kept is None:
        return damping
    close = jnp.abs(kept.damping - damping) <= _NEAR * damping
    return jnp.where(close, kept.damping, damping)


# Compiled by itself, so that steps outside of `jit` do not compile the loop anew.
@jax.jit
def solve(
    system: System,
    inverse: jax.Array,
    rhs: jax.Array,
    unit: jax.Array,
    slot: jax.Array,
    damping: jax.Array,
    kept: Kept | None,
) -> tuple[jax.Array, Kept | None]:
    r"""Solve $D A D x = D b / \mu$ for `system` $D A D$; always finite.

    `inverse` is the diagonal of $D$, and $\mu$ at least the largest entry of $D b$.
    Where $A$ is singular to within rounding, $\mu D x$ is the limit of
    $(\delta I + A)^{-1} b$ on the range of $A$. Since the step that has left what is
    `kept` only `slot` was overwritten; all else depends on divisor and `damping`.
    """
    scaled = inverse * rhs / unit
    if kept is None:
        solution, sound = _afresh(system, scaled)
    else:
        # An accelerator would have to ask the host whether to factorise.
        solution, sound, kept = lax.platform_dependent(
            kept,
            cpu=lambda kept: _resumed(system, scaled, slot, damping, kept),
            default=lambda kept: (
                *_afresh(system, scaled),
                kept._replace(run=vary_like(kept, jnp.int32(-1))),
            ),
        )
    remedy = lambda: in_basis(system, inverse, rhs, unit)
    return _unless(sound, solution, remedy), kept


def in_basis(
    system: System, inverse: jax.Array, rhs: jax.Array, unit: jax.Array
) -> jax.Array:
    """Return the solution by a basis of the rows."""
    norm = jnp.linalg.norm(system.rows(0, system.size))
    row = lambda index: system.rows(index, 1)[0]
    return pivoted.solve(row, norm, inverse, rhs, unit)


def _unless(good: jax.Array, value: Any, make: Callable[[], Any]) -> Any:
    """Return `value` if it is `good`, else what `make` makes in its place.

    A loop of at most one round: unlike `lax.cond`, under `vmap` it makes nothing unless
    some member of the batch needs it, and XLA carries arrays through it without a copy.
    """
    bad = jnp.logical_not(good)
    same = functools.partial(vary_like, (bad, value))
    body = lambda _: same((jnp.asarray(False), make()))
    return lax.while_loop(lambda carry: carry[0], body, same((bad, value)))[1]


def _afresh(system: System, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the solution by a new factorisation, and whether it is sound."""

    def by_blocks(block: int) -> tuple[jax.Array, jax.Array]:
        # LAPACK wants columns contiguous. The transpose has that without a copy.
        factor = cholesky.factorise(system.rows(0, system.size).T, block)
        return cholesky.solve(factor, rhs), cholesky.is_sound(factor)

    # NVIDIA's and AMD's libraries divide matrices themselves, and every call of them is
    # a kernel or more: 7 in place of 105 at 1024 rows.
    whole = lambda: by_blocks(system.size)
    return lax.platform_dependent(
        cuda=whole, rocm=whole, default=lambda: by_blocks(cholesky.UNBLOCKED)
    )


def _resumed(
    system: System, rhs: jax.Array, slot: jax.Array, damping: jax.Array, kept: Kept
) -> tuple[jax.Array, jax.Array, Kept]:
    """Return the solution with what is kept, whether it is sound, and what to keep."""
    # The last run begins early where runs do not divide the slots.
    run = jnp.minimum(slot // _RUN * _RUN, system.size - _RUN).astype(jnp.int32)
    place = jnp.arange(system.size) - run
    inside = (place >= 0) & (place < _RUN)

    def renew() -> Kept:
        eye = jnp.eye(system.size, dtype=system.gram.dtype)
        either = inside[None] | inside[:, None]
        rows = jnp.where(either, eye, system.rows(0, system.size))
        factor = cholesky.factorise(rows.T)
        coupling = jnp.where(inside[None], 0, system.rows(run, _RUN))
        coupling = cholesky.solve_right(factor, coupling)
        new = Kept(run, damping, system.divisor, factor, coupling)
        return jax.tree.map(jnp.ravel, new)

    valid = (kept.run == run) & (kept.damping == damping)
    valid &= kept.divisor == system.divisor
    # Flat arrays have only one layout. Matrices would be transposed for LAPACK in front
    # of every step.
    flat = _unless(valid, jax.tree.map(jnp.ravel, kept), renew)
    kept = jax.tree.map(lambda array, like: array.reshape(like.shape), flat, kept)
    # Right behind a renewal too, so that the result is the same whenever that was.
    row = jnp.where(inside, 0, system.rows(slot, 1)[0])
    row = cholesky.forward(kept.factor, row)
    kept = kept._replace(coupling=kept.coupling.at[slot - run].set(row))
    corner = lax.dynamic_slice_in_dim(system.rows(run, _RUN), run, _RUN, axis=1)
    corner = cholesky.factorise(corner - dot(kept.coupling, kept.coupling.T))
    others = cholesky.forward(kept.factor, jnp.where(inside, 0, rhs))
    last = lax.dynamic_slice_in_dim(rhs, run, _RUN) - dot(kept.coupling, others)
    last = cholesky.solve(corner, last)
    others = cholesky.backward(kept.factor, others - dot(last, kept.coupling))
    solution = lax.dynamic_update_slice_in_dim(others, last, run, axis=0)
    sound = cholesky.is_sound(kept.factor) & cholesky.is_sound(corner)
    return solution, sound, kept

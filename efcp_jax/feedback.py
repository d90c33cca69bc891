r"""The gradient's way in and out: metric, error feedback, compression, the window.

$a_t = e_t + g_t$, $c_t = C(a_t)$, $e_{t+1} = a_t - c_t$, $e_0 = 0$. Nothing is lost,
only delayed; the rounding of stored values is part of the error.

Whether a gradient is skipped is known on one device before anything is changed, and on
several behind their sum; what hangs on that is here.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from efcp_jax import passes, quantized
from efcp_jax.compressors import ROW_AXIS, Compressor, Space
from efcp_jax.devices.layout import Layout
from efcp_jax.metrics import DiagonalMetric, Gradient, Measured


class Taken(NamedTuple):
    """What a step makes of a gradient, before all devices know whether to skip it."""

    row: chex.ArrayTree  # $c_t / s$, entries of magnitude at most about 1
    scale: jax.Array  # the power of two $s$; 0 for a zero gradient
    error: chex.ArrayTree | None  # $e_{t+1}$, or None without error feedback
    basis: chex.ArrayTree | None  # of the next step
    finite: jax.Array  # whether all entries of the gradient on this device are
    layout: Layout
    measured: Measured | None  # by the metric
    guarded: bool  # whether it was known whether to skip: nothing is left to choose

    @property
    def share(self) -> jax.Array | None:
        """This device's share of the mean of the moments."""
        return None if self.measured is None else self.measured.share

    def outward(self, make: Callable[[Any], Any], value: Any) -> Any:
        """Return the update `make(value)` in the metric and dtypes of the user."""
        if self.measured is None:
            return self.layout.cast(make(value))
        measured, value = self.measured.behind(value)
        return self.layout.cast(measured.scaled(make(value)))

    def kept(self, accept: jax.Array, mean: Any, old: Any) -> dict[str, Any]:
        """Return the next fields of the state `old`, given the mean of the moments."""
        metric = self.measured and self.measured.state(mean)
        one = lambda new, old: jnp.where(accept, new, old)
        choose = lambda new, old: jax.tree.map(one, new, old)
        left = (lambda new, _: new) if self.guarded else choose
        return {
            "count": jnp.asarray(optax.safe_increment(old.count)),
            "skipped": one(old.skipped, optax.safe_increment(old.skipped)),
            "error": left(self.error, old.error),
            "basis": choose(self.basis, old.basis),
            "metric": left(metric, old.metric),
        }


@dataclasses.dataclass(frozen=True)
class Feedback:
    """How gradients enter a step, and the fields of its state that this needs."""

    compressor: Compressor
    metric: DiagonalMetric | None
    error: bool  # whether what compression drops is added to the next one
    error_dtype: np.dtype | None  # in which that is kept; None for the working dtype
    skip_nonfinite: bool

    def init(self, space: Space) -> dict[str, Any]:
        """Return the fields in front of the first step."""
        vector, _, basis = space.zeros()
        zeros = lambda: quantized.zeros(vector, space.specs()[0], self.error_dtype)
        return {
            "count": jnp.zeros((), jnp.int32),
            "skipped": jnp.zeros((), jnp.int32),
            "error": zeros() if self.error else None,
            "basis": basis,
            "metric": self.metric and self.metric.init(space.layout),
        }

    def specs(self, space: Space) -> dict[str, Any]:
        """Return the `PartitionSpec` of each array that `init` returns."""
        vector, _, basis = space.specs()
        return {
            "count": PartitionSpec(),
            "skipped": PartitionSpec(),
            "error": quantized.specs(vector, self.error_dtype) if self.error else None,
            "basis": basis,
            "metric": self.metric and self.metric.specs(space.layout),
        }

    def take(self, space: Space, updates: chex.ArrayTree, state: Any) -> Taken:
        """Return the compressed gradient, in the metric if there is one."""
        alone, measured = not space.layout.axes, None
        guarded = self.skip_nonfinite and alone
        if self.metric is None:
            leaves = [*map(jnp.asarray, jax.tree.leaves(updates))]
            kinds = space.layout.by_kind(leaves)
            finite = passes.finite(kinds, lambda: jax.tree.leaves(space.pack(updates)))
        else:
            seen = state.count - state.skipped
            given = space.layout, updates, state.metric, seen, guarded
            measured = self.metric.measure(*given)
            finite = measured.finite
        if self.skip_nonfinite:
            updates = _without_faults(updates, finite)
        gradient = Gradient(updates, measured)
        # Dividing the row by the power of two above its largest entry is exact and lets
        # gradients of any magnitude share a window. It needs that magnitude on all
        # devices, so it is done on one alone, where none has to ask others. On several,
        # norms above 1e19 overflow the Gram matrix, which skips the step, and norms
        # below 1e-19 vanish in it.
        error = None
        if state.error is None:
            # Of a gradient that is not accepted nothing is kept, whatever it is.
            packed = space.pack(gradient.tree)
            row, scale, basis = space.compress(packed, state.basis, scaled=alone)
        else:
            # Knowing beforehand whether to add it, the error is overwritten where it
            # lies; choosing between the new and the old one needs both.
            accept = finite if guarded else jnp.asarray(True)
            given = gradient, state.error, state.basis, accept, state.count
            row, scale, error, basis = space.feed(*given, scaled=alone)
        return Taken(row, scale, error, basis, finite, space.layout, measured, guarded)


@jax.custom_jvp
def _without_faults(tree: Any, finite: jax.Array) -> Any:
    """Return `tree`; where it is differentiated, zeros if it is skipped.

    Products with zeros, which a derivative adds up, would be NaN.
    """
    del finite
    return tree


@_without_faults.defjvp
def _without_faults_jvp(primals: Any, tangents: Any) -> Any:
    zeroed = lambda x: jnp.where(primals[1], x, 0)
    return jax.tree.map(zeroed, (primals[0], tangents[0]))


class Window(NamedTuple):
    """The sliding window: the last m compressed gradients, in any representation.

    Row i stands for the past gradient $s_i r_i$, with a stored row $r_i$ of magnitude
    about 1 and a power of two $s_i$. Slots that were never filled are zero, and need no
    special case. Rows lie end to end along one axis, so a row is a window of one.
    """

    rows: chex.ArrayTree  # every array `(s, m k, ...)` if a row's is `(s, k, ...)`
    scale: jax.Array  # the power of two that multiplies each row, `(m,)`
    slot: jax.Array  # the slot that the next row will overwrite, int32
    filled: jax.Array  # the number of slots that hold a row, int32

    @classmethod
    def empty(cls, space: Space, size: int, dtype: jax.typing.DTypeLike) -> "Window":
        """Return a window of `size` zero rows."""

        def stack(leaf: jax.Array) -> jax.Array:
            shape = list(leaf.shape)
            shape[ROW_AXIS] *= size
            return jnp.zeros(shape, leaf.dtype)

        rows, zero = jax.tree.map(stack, space.zeros()[1]), jnp.zeros((), jnp.int32)
        return cls(rows, jnp.zeros(size, dtype), zero, jnp.zeros_like(zero))

    @classmethod
    def specs(cls, space: Space) -> Any:
        """Return the `PartitionSpec` of each array."""
        one = PartitionSpec()
        return cls(space.specs()[1], one, one, one)  # pyright: ignore

    def insert(
        self, row: chex.ArrayTree, scale: jax.Array, accept: jax.Array
    ) -> "Window":
        """Overwrite the oldest row, or return the window as it is if not `accept`."""
        slot, size = self.slot, self.scale.shape[0]
        put = lambda old, new: passes.insert(old, new, slot, ROW_AXIS, accept)
        return Window(
            rows=jax.tree.map(put, self.rows, row),
            scale=self.scale.at[slot].set(jnp.where(accept, scale, self.scale[slot])),
            slot=jnp.where(accept, (slot + 1) % size, slot),
            filled=jnp.where(accept, jnp.minimum(self.filled + 1, size), self.filled),
        )

    def products(self, product: Callable[[Any], Any], row: chex.ArrayTree) -> Any:
        """Return `product` of all rows, `(m,)` or `(g, m)`, once `row` is inserted."""
        put = lambda every, new: every.at[..., self.slot].set(new[..., 0])
        return jax.tree.map(put, product(self.rows), product(row))

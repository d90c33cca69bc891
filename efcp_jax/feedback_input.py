"""The way into a step and out of it: metric, error feedback and compression.

Whether a gradient is skipped is known on one device before anything is changed, and on
several behind their sum; what hangs on that is here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efcp_jax import feedback
from efcp_jax.compressors import Space
from efcp_jax.devices.layout import Layout
from efcp_jax.metrics import Measured, Metric


class Taken(NamedTuple):
    """What a step makes of a gradient, before all devices know whether to skip it.

    Attributes:
        row: The compressed gradient.
        finite: Whether all entries of the gradient on this device are finite.
        measured: The metric, or None.
        guarded: Whether it was known whether to skip, and nothing is left to choose.
    """

    row: feedback.Compressed
    finite: jax.Array
    layout: Layout
    measured: Measured | None
    guarded: bool

    @property
    def share(self) -> jax.Array | None:
        """This device's share of the mean of the moments."""
        return None if self.measured is None else self.measured.share

    def error(self, accept: jax.Array, old: Any) -> Any:
        """Return the next error."""
        return self.row.error if self.guarded else select(accept, self.row.error, old)

    def metric(self, accept: jax.Array, mean: jax.Array | None, old: Any) -> Any:
        """Return the next state of the metric, from the mean of its moments."""
        new = None if self.measured is None else self.measured.state(mean)
        return new if self.guarded else select(accept, new, old)

    def outward(self, make: Callable[[Any], Any], value: Any) -> Any:
        """Return the update `make(value)` in the metric and dtypes of the user."""
        if self.measured is None:
            return self.layout.cast(make(value))
        measured, value = self.measured.behind(value)
        return self.layout.cast(measured.scaled(make(value)))


def take(
    space: Space, updates: Any, state: Any, metric: Metric | None, skip_nonfinite: bool
) -> Taken:
    """Return the compressed gradient, in the metric if there is one.

    On one device it is known before anything is changed whether to skip.
    """
    alone, measured = not space.layout.axes, None
    guarded = skip_nonfinite and alone
    if metric is None:
        finite = feedback.finite(space, updates)
    else:
        seen = state.count - state.skipped
        measured = metric.measure(space.layout, updates, state.metric, seen, guarded)
        finite = measured.finite
    if skip_nonfinite:
        updates = _without_faults(updates, finite)
    if measured is not None:
        updates = measured.scaled(updates)
    accept = finite if guarded else jnp.asarray(True)
    row = feedback.compress(
        space,
        updates,
        state.error,
        state.basis,
        scaled=alone,
        accept=accept,
        count=state.count,
    )
    return Taken(row, finite, space.layout, measured, guarded)


@jax.custom_jvp
def _without_faults(tree: Any, finite: jax.Array) -> Any:
    """Return `tree`; of a derivative, zeros in place of a gradient that is skipped.

    Its products with zeros, which a derivative adds up, would be NaN.
    """
    del finite
    return tree


@_without_faults.defjvp
def _without_faults_jvp(primals: Any, tangents: Any) -> Any:
    finite = primals[1]
    zeroed = lambda tree: jax.tree.map(lambda x: jnp.where(finite, x, 0), tree)
    return zeroed(primals[0]), zeroed(tangents[0])


def select(accept: jax.Array, new: Any, old: Any) -> Any:
    """Return the arrays of `new` if `accept`, else those of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)

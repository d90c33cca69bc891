"""The states of the transformations: arrays only, of fixed shapes and dtypes.

Every field is a scalar, an array of its own, or a dictionary of arrays, one for each
group of leaves that are one batch, named by the shape of their matrices. Checkpoints,
`optax.tree.map_params` and Flax's optimizers take it as it is.
"""

from typing import Any, NamedTuple

import chex
import jax

from efcp_jax.metrics import MetricState
from efcp_jax.window import Window


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
        count: Number of updates, int32.
        skipped: Number of updates skipped for entries that were not finite, int32.
        error: What compression has dropped so far, in working form.
        basis: What the compressor carries between steps, or None.
        metric: The moments of the metric, or None.
    """

    count: jax.Array
    skipped: jax.Array
    error: chex.ArrayTree
    basis: chex.ArrayTree | None
    metric: MetricState | None = None


class ScaleByMfacState(NamedTuple):
    """State of `scale_by_mfac`.

    Attributes:
        count: Number of updates, int32.
        skipped: Number of updates skipped for entries that were not finite, int32.
        error: What compression has dropped so far, in working form; None without error
            feedback.
        basis: What the compressor carries between steps, or None.
        window: The last m compressed gradients.
        gram: Inner products of the window's stored rows, shape `(m, m)`; where the
            compressor is block diagonal, `(g, m, m)` for each group of g leaves.
        factor: What is kept of the factorisation of each m x m system for the steps to
            come, or None.
        metric: The moments of the metric, or None.
    """

    count: jax.Array
    skipped: jax.Array
    error: chex.ArrayTree | None
    basis: chex.ArrayTree | None
    window: Window
    gram: chex.ArrayTree
    factor: chex.ArrayTree | None
    metric: MetricState | None = None


class ScaleByGgtState(NamedTuple):
    """State of `scale_by_ggt`; the fields are those of `ScaleByMfacState`."""

    count: jax.Array
    skipped: jax.Array
    error: chex.ArrayTree | None
    basis: chex.ArrayTree | None
    window: Window
    gram: chex.ArrayTree
    factor: chex.ArrayTree | None
    metric: MetricState | None = None


OWN = (ErrorFeedbackState, ScaleByMfacState, ScaleByGgtState)


def own_states(state: Any, kinds: tuple[type, ...] = OWN) -> list[Any]:
    """Return the states of `kinds` in `state`, however deeply they are wrapped."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in nodes if isinstance(node, kinds)]


def only_state(state: Any, kinds: tuple[type, ...] = OWN, of: str = "efcp_jax") -> Any:
    """Return the one state of `kinds` in `state`, or raise; `of` names it."""
    found = own_states(state, kinds)
    if len(found) != 1:
        raise ValueError(
            f"`state` must contain exactly one state of `{of}`, got {len(found)}. Pass"
            " the part of the state that belongs to one transformation."
        )
    return found[0]

"""The states of this package inside of the state of an optimizer."""

from typing import Any

import jax

from efcp_jax.transforms import (
    ErrorFeedbackState,
    ScaleByGgtState,
    ScaleByMfacState,
)


STATES = (ErrorFeedbackState, ScaleByMfacState, ScaleByGgtState)


def own_states(state: Any, kinds: tuple[type, ...] = STATES) -> list[Any]:
    """Return the states of `kinds` in `state`, however deeply they are wrapped."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in nodes if isinstance(node, kinds)]

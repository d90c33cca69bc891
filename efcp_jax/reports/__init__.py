"""What is computed from states on request, and how they are found in an optimizer's."""

from typing import Any

import jax

from efcp_jax.transforms import ErrorFeedbackState, ScaleByGgtState, ScaleByMfacState


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

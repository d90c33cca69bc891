"""Keeping updates where the parameters are, wherever that may be.

Under Auto mesh axes the partitioner decides where arrays live: what a step prefers
would spread to the user's gradients and, by way of the updates, to the new parameters.
So nothing is let through on the way in, and on the way out the update is put where the
parameters are: behind a barrier, with no preference of its own, in one operation with
them.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from efcp_jax.experimental import propagation_barrier


def inward(leaves: list[Any]) -> list[Any]:
    """Return the gradients `leaves`; where they live is not their users' concern."""
    return _together(propagation_barrier, leaves)


def outward(leaves: list[Any], likes: list[Any], mesh: Any) -> list[Any]:
    """Return the updates `leaves` where the parameters `likes` live on `mesh`."""

    def free(value: Any) -> Any:
        anywhere = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * value.ndim)
        value = propagation_barrier(value)
        # Without this, replicated parameters would leave it to XLA where it lives.
        return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, anywhere))

    freed = _together(free, leaves)
    return [_beside(like, value) for like, value in zip(likes, freed, strict=True)]


def _beside(like: Any, value: Any) -> Any:
    if isinstance(like, Tracer):
        # Entry by entry of both, so that both are divided alike; which of them it is,
        # is known too late for the choice to be simplified away.
        never = jax.lax.optimization_barrier(jnp.zeros((), bool))
        return jax.lax.select(
            jnp.broadcast_to(never, value.shape), like.astype(value.dtype), value
        )
    # Outside of traced functions it can be seen.
    at = getattr(like, "sharding", None)
    known = isinstance(at, NamedSharding)
    return jax.lax.with_sharding_constraint(value, at) if known else value


def _together(function: Callable[[Any], Any], leaves: list[Any]) -> list[Any]:
    """Return `function` of each of `leaves`; where traced, of equal ones stacked.

    What is brought elsewhere takes one collective then, whose program may be large:
    on 256 TPUs as large as the rest of a step. Where nothing is, XLA undoes the stack.
    """
    made = list(leaves)
    alike: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tracer):
            alike.setdefault((leaf.shape, leaf.dtype), []).append(index)
    for indices in alike.values():
        if len(indices) == 1:
            made[indices[0]] = function(leaves[indices[0]])
            continue
        parts = jnp.unstack(function(jnp.stack([leaves[i] for i in indices])))
        for index, part in zip(indices, parts, strict=True):
            made[index] = part
    return made

"""Running a step on every device at once: the way in, the step, and the way out.

Under Auto mesh axes the partitioner decides where arrays live: what a step prefers
would spread to the user's gradients and, by way of the updates, to the new parameters.
So nothing is let through on the way in, and on the way out the update is put where the
parameters are: behind a barrier, with no preference of its own, in one operation with
them.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from efcp_jax.devices import auto
from efcp_jax.devices.placement import Placement, explicit_sharding
from efcp_jax.experimental import propagation_barrier


def run(
    function: Callable[..., Any],
    placement: Placement | None,
    in_specs: tuple[Any, ...],
    out_specs: Any,
    *args: Any,
    beside: Any = None,
) -> Any:
    """Call `function` on each device's parts of `args`; plainly on one device.

    Without `args` JAX would not know the devices of an abstract mesh: where the step
    has chosen the division they are those of the arrays `beside`.
    """
    if placement is None:
        return function(*args)
    spread = jax.shard_map(
        function,
        mesh=placement.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        # Blocks that several devices hold are computed alike on all of them, which
        # the check of varying axes cannot see.
        check_vma=False,
    )
    traced = [leaf for leaf in jax.tree.leaves(beside) if isinstance(leaf, Tracer)]
    if not traced or placement.shapes is None:
        return jax.jit(spread)(*args)
    tied = lambda leaf, *args: jax.lax.optimization_barrier((spread(*args), leaf))[0]
    return jax.jit(tied)(min(traced, key=lambda leaf: leaf.size), *args)


def enter(tree: chex.ArrayTree, placement: Placement | None) -> chex.ArrayTree:
    """Return the gradients `tree` as the step takes them."""
    if placement is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    if placement.shapes is None:
        return treedef.unflatten(map(_move, leaves, placement.specs))
    barred = _together(propagation_barrier, leaves)
    return treedef.unflatten(map(auto.pad, barred, placement.shapes))


def leave(
    tree: chex.ArrayTree,
    updates: chex.ArrayTree,
    like: chex.ArrayTree,
    placement: Placement | None,
) -> chex.ArrayTree:
    """Return the update `tree` of a step where the gradients `updates` were.

    Under Auto axes it is put where the parameters `like` are.
    """
    if placement is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    given = jax.tree.leaves(updates)
    if placement.shapes is None:
        at = list(map(explicit_sharding, given))
        if not any(at):
            return tree
        specs = (each.spec if each else PartitionSpec() for each in at)
        return treedef.unflatten(map(_move, leaves, specs))

    def free(value: Any) -> Any:
        anywhere = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * value.ndim)
        value = propagation_barrier(value)
        # Without this, replicated parameters would leave it to XLA where it lives.
        at = NamedSharding(placement.mesh, anywhere)
        return jax.lax.with_sharding_constraint(value, at)

    freed = _together(free, list(map(auto.cut, leaves, map(jnp.shape, given))))
    return treedef.unflatten(map(_beside, jax.tree.leaves(like), freed))


def _move(leaf: Any, spec: PartitionSpec) -> Any:
    """Reshard `leaf` if its type, under Explicit axes, is another."""
    at = explicit_sharding(leaf)
    if at is None or at.spec == spec:
        return leaf
    return jax.sharding.reshard(leaf, NamedSharding(at.mesh, spec))


def _beside(like: Any, value: Any) -> Any:
    if isinstance(like, Tracer):
        # Entry by entry of both, so that both are divided alike; which of them it is,
        # is known too late for the choice to be simplified away.
        never = jax.lax.optimization_barrier(jnp.zeros((), bool))
        never = jnp.broadcast_to(never, value.shape)
        return jax.lax.select(never, like.astype(value.dtype), value)
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

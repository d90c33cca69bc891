"""Running a step on every device at once: its state, the way in, and the way out.

Under Auto mesh axes the partitioner would spread what a step prefers to the user's
gradients and, by way of the updates, to the new parameters. So nothing is let through
on the way in, and on the way out the update is put where the parameters are: behind a
barrier, with no preference of its own, in one operation with them.
"""

from collections.abc import Callable
import contextvars
import dataclasses
from typing import Any

import chex
import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from efcp_jax.devices.placement import Placement, explicit_sharding
from efcp_jax.experimental import propagation_barrier


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Description:
    """The state of one transformation, described and not made: a tree of no leaves."""

    space: Any
    placement: Placement | None
    arrays: Any  # the state with structs of global arrays
    specs: Any  # the state with the `PartitionSpec` of each

    def told(self, params: chex.ArrayTree) -> bool:
        """Return whether it is of all of `params`, and was told where they are."""
        known = self.placement is not None and self.placement.shapes is None
        return known and self.space.layout.treedef == jax.tree.structure(params)


describing = contextvars.ContextVar("efcp_jax_describing", default=False)


def described(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` where every `init` returns a `Description` for its state."""
    context = contextvars.copy_context()
    context.run(describing.set, True)
    return context.run(function, *args, **kwargs)


def over(
    placement: Placement | None, function: Callable[..., Any], given: Any, made: Any
) -> Callable[..., Any]:
    """Return `function` of each device's parts, by specs; as it is on one device."""
    if placement is None:
        return function
    # Blocks that several devices hold are computed alike on all of them, which the
    # check of varying axes cannot see.
    of = {"mesh": placement.mesh, "in_specs": given, "out_specs": made}
    return jax.jit(jax.shard_map(function, **of, check_vma=False))


def start(
    placement: Placement | None, init: Callable[[], Any], specs: Any, params: Any
) -> Any:
    """Return the state that `init` makes, on the devices that hold `params`."""
    leaves, make = jax.tree.leaves(params), over(placement, init, (), specs)
    traced = [leaf for leaf in leaves if isinstance(leaf, Tracer)]
    if placement is not None and placement.shapes is not None and traced:
        # Without an argument JAX would not know the devices of an abstract mesh.
        tied = lambda leaf: jax.lax.optimization_barrier((make(), leaf))[0]
        return jax.jit(tied)(min(traced, key=lambda leaf: leaf.size))
    is_held = lambda x: isinstance(x, jax.Array) and x.committed
    if placement is None and not traced and all(map(is_held, leaves)):
        devices = set().union(*(leaf.devices() for leaf in leaves))
        return jax.device_put(make(), *devices) if len(devices) == 1 else make()
    return make()


def enter(placement: Placement | None, tree: Any) -> Any:
    """Return the gradients `tree` as the step takes them."""
    if placement is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    if placement.shapes is None:
        return treedef.unflatten(map(_move, leaves, placement.specs))
    barred = _together(propagation_barrier, leaves)
    return treedef.unflatten(map(_padded, barred, placement.shapes))


def leave(placement: Placement | None, tree: Any, updates: Any, like: Any) -> Any:
    """Return the update `tree` where the gradients were; under Auto axes, at `like`."""
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

    freed = _together(free, list(map(_cut, leaves, map(jnp.shape, given))))
    return treedef.unflatten(map(_beside, jax.tree.leaves(like), freed))


def _padded(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return `value` padded with zeros to `shape`, of one axis for a scalar."""
    if value.shape == shape:
        return value
    value = value.reshape(value.shape or (1,))
    missing = [(0, n - m) for n, m in zip(shape, value.shape, strict=True)]
    return jnp.pad(value, missing)


def _cut(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_padded`, where `shape` is that of the leaf."""
    if value.shape == shape:
        return value
    return value[tuple(slice(n) for n in shape or (1,))].reshape(shape)


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
            parts = [function(leaves[indices[0]])]
        else:
            parts = jnp.unstack(function(jnp.stack([leaves[i] for i in indices])))
        for index, part in zip(indices, parts, strict=True):
            made[index] = part
    return made

"""Running a step on every device at once: the way in, the step, and the way out."""

from collections.abc import Callable
from typing import Any

import chex
import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from efcp_jax.devices import anchor, auto
from efcp_jax.devices.placement import Placement, explicit_sharding


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
    if placement.shapes is None:
        return _move(tree, placement.specs)
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(map(auto.pad, anchor.inward(leaves), placement.shapes))


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
    if placement.shapes is None:
        return _move_like(tree, updates)
    leaves, treedef = jax.tree.flatten(tree)
    leaves = list(map(auto.cut, leaves, map(jnp.shape, jax.tree.leaves(updates))))
    where = jax.tree.leaves(like)
    return treedef.unflatten(anchor.outward(leaves, where, placement.mesh))


def _move(tree: chex.ArrayTree, specs: tuple[PartitionSpec, ...]) -> chex.ArrayTree:
    """Reshard the leaves of `tree` whose types, under Explicit axes, differ."""
    leaves, treedef = jax.tree.flatten(tree)
    moved = []
    for leaf, spec in zip(leaves, specs, strict=True):
        sharding = explicit_sharding(leaf)
        if sharding is not None and sharding.spec != spec:
            leaf = jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, spec))
        moved.append(leaf)
    return treedef.unflatten(moved)


def _move_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Reshard the leaves of `tree` to the types of `like`, under Explicit axes."""
    shardings = [explicit_sharding(leaf) for leaf in jax.tree.leaves(like)]
    specs = tuple(PartitionSpec() if each is None else each.spec for each in shardings)
    return _move(tree, specs) if any(s is not None for s in shardings) else tree

"""A step as an Optax transformation: Optax's protocol, checks, and devices."""

from collections.abc import Callable
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from efcp_jax import _validate_trees, numerics, varying
from efcp_jax.compressors import Compressor, Space
from efcp_jax.devices import description, placement, spread
from efcp_jax.devices.trees import strip_boxes


def _stand_in() -> type:
    """Return the type that `optax.tree.map_params` initialises with.

    It stands for parameters of any structure.
    """
    found: list[type] = []

    def init(params: Any) -> tuple[()]:
        found.append(type(params))
        return ()

    optax.tree.map_params(init, lambda leaf: leaf, ())
    return found[0]


_STAND_IN = _stand_in()


def transformation(
    compressor: Compressor,
    init: Callable[[Space], Any],
    specs: Callable[[Space], Any],
    step: Callable[..., Any],
    hyperparameters: dict[str, Any],
    sharding: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return `init` and `step` as a transformation, on one device or spread over many.

    `init`, `specs` and `step` speak of a space; here the space is made from the tree.
    """

    def space_of(tree, dtype, placed):
        return compressor.bind(placement.layout(tree, dtype, placed))

    def init_fn(params):
        params = strip_boxes(params)
        _validate_trees.floating_leaves(params)
        placed = placement.find(params, sharding)
        space = space_of(params, working_dtype(params), placed)
        state = description.start(init, space, placed, specs(space), params)
        if not description.asked():
            state = varying.over(varying.axes_of(params), state)
        if isinstance(params, _STAND_IN):
            return _outline(state)
        return state if placed is not None else placement.beside(state, params)

    def match(updates, state, placed):
        """Return whether `state` fits `placed`, the space, and what it should be."""
        space = space_of(updates, _state_dtype(state), placed)
        local = jax.eval_shape(lambda: init(space))
        made = description.global_arrays(local, specs(space), placed)
        return _validate_trees.is_like(state, made), space, made

    def fitting(updates, like, state):
        """Return the placement and the space that `state` was made for."""
        placed = placement.find(like, sharding, updates, state)
        fits, space, made = match(updates, state, placed)
        if not fits and placed is not None and placed.shapes is not None:
            # Under Auto axes `init` may not have seen the mesh that is seen now. Then
            # every device makes the step of one: kernels for TPUs cannot be divided.
            fits, alone, _ = match(updates, state, None)
            if fits:
                return placement.everywhere(updates, placed.mesh), alone
        _validate_trees.same_state(state, made, updates)
        return placed, space

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        given = jax.tree.structure(updates)
        updates, params = strip_boxes(updates), strip_boxes(params)
        like = updates if params is None else _beside(updates, params)
        _validate_trees.floating_leaves(updates, "updates")
        _validate_trees.same_trees(updates, like)
        placed, space = fitting(updates, like, state)
        values = {
            name: jnp.asarray(value(state.count) if callable(value) else value)
            for name, value in hyperparameters.items()
        }
        # Restored by a checkpointer, they may be arrays of NumPy.
        updates, state = jax.tree.map(jnp.asarray, (updates, state))
        taken = updates, state, values
        updates, state, values = varying.over(varying.axes_of(taken), taken)
        tree_specs, state_specs = PartitionSpec(), specs(space)
        if placed is not None:
            tree_specs = jax.tree.structure(updates).unflatten(placed.specs)
        new_updates, new_state = spread.run(
            functools.partial(step, space),
            placed,
            (tree_specs, state_specs, {name: PartitionSpec() for name in values}),
            (tree_specs, state_specs),
            spread.enter(updates, placed),
            state,
            values,
        )
        new_updates = spread.leave(new_updates, updates, like, placed)
        return given.unflatten(jax.tree.leaves(new_updates)), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _outline(state: Any) -> Any:
    """Return the fields of `state`, those whose structure is the parameters' as leaves.

    That is a tree prefix of every state of a transformation, whatever the parameters:
    dictionaries are named by leaves and their shapes. No field mirrors the parameters.
    """
    of_params = lambda node: isinstance(node, dict | _STAND_IN)
    return jax.tree.map(lambda _: 0, state, is_leaf=of_params)


def _beside(updates: Any, params: Any) -> Any:
    """Return the parameters that have gradients: where there is None, nothing is."""
    is_none = lambda node: node is None
    keep = lambda update, param: None if update is None else param
    try:
        return jax.tree.map(keep, updates, params, is_leaf=is_none)
    except ValueError:  # said better by the checks of both trees
        return params


def working_dtype(tree: chex.ArrayTree) -> Any:
    """Return float64 if a leaf of `tree` is float64 or complex128, else float32."""
    wide = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    dtypes = {jnp.dtype(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)}
    return jnp.float64 if wide & dtypes else jnp.float32


def _state_dtype(state) -> Any:
    """Return the working dtype that `init` chose."""
    held = jax.tree.leaves(getattr(state, "gram", state.error))
    return numerics.widest(held[0].dtype) if held else jnp.float32

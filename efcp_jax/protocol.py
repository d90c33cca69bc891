"""A step as an Optax transformation: Optax's protocol, checks, and devices."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

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


class Step(NamedTuple):
    """A transformation in terms of a space, which is made of the tree here.

    Attributes:
        compressor: What makes a space of the layout of a tree.
        init: From a space to the state in front of the first step.
        specs: From a space to the `PartitionSpec` of each array of that state.
        step: From a space, updates, a state and the values of the hyperparameters to
            the next updates and state.
    """

    compressor: Compressor
    init: Callable[[Space], Any]
    specs: Callable[[Space], Any]
    step: Callable[..., tuple[Any, Any]]


def transformation(
    step: Step, hyperparameters: dict[str, Any], sharding: Any
) -> optax.GradientTransformationExtraArgs:
    """Return `step` as a transformation, on one device or spread over many.

    Args:
        step: What it does.
        hyperparameters: Numbers, or schedules from the count of the state to one.
        sharding: Where the parameters live, as in the arguments of users.
    """
    made = _Transformation(step, hyperparameters, sharding)
    return optax.GradientTransformationExtraArgs(made.init_fn, made.update_fn)


@dataclasses.dataclass(frozen=True, eq=False)
class _Transformation:
    """The two functions of a transformation, and what they have in common."""

    step: Step
    hyperparameters: dict[str, Any]
    sharding: Any

    def init_fn(self, params: Any) -> Any:
        params = strip_boxes(params)
        _validate_trees.floating_leaves(params)
        placed = placement.find(params, self.sharding)
        space = self.space(params, working_dtype(params), placed)
        given = space, placed, self.step.specs(space), params
        state = description.start(self.step.init, *given)
        if not description.asked():
            state = varying.over(varying.axes_of(params), state)
        if isinstance(params, _STAND_IN):
            return _outline(state)
        return state if placed is not None else placement.beside(state, params)

    def update_fn(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        given = jax.tree.structure(updates)
        updates, params = strip_boxes(updates), strip_boxes(params)
        like = updates if params is None else _beside(updates, params)
        _validate_trees.floating_leaves(updates, "updates")
        _validate_trees.same_trees(updates, like)
        placed, space = self.fitting(updates, like, state)
        values = {
            name: jnp.asarray(value(state.count) if callable(value) else value)
            for name, value in self.hyperparameters.items()
        }
        # Restored by a checkpointer, they may be arrays of NumPy.
        updates, state = jax.tree.map(jnp.asarray, (updates, state))
        taken = updates, state, values
        updates, state, values = varying.over(varying.axes_of(taken), taken)
        tree_specs, state_specs = PartitionSpec(), self.step.specs(space)
        if placed is not None:
            tree_specs = jax.tree.structure(updates).unflatten(placed.specs)
        new_updates, new_state = spread.run(
            functools.partial(self.step.step, space),
            placed,
            (tree_specs, state_specs, dict.fromkeys(values, PartitionSpec())),
            (tree_specs, state_specs),
            spread.enter(updates, placed),
            state,
            values,
        )
        new_updates = spread.leave(new_updates, updates, like, placed)
        return given.unflatten(jax.tree.leaves(new_updates)), new_state

    def space(self, tree: Any, dtype: Any, placed: Any) -> Space:
        return self.step.compressor.bind(placement.layout(tree, dtype, placed))

    def fitting(self, updates: Any, like: Any, state: Any) -> tuple[Any, Space]:
        """Return the placement and the space that `state` was made for."""
        placed = placement.find(like, self.sharding, updates, state)
        space, made = self.expected(updates, state, placed)
        fits = _validate_trees.is_like(state, made)
        if not fits and placed is not None and placed.shapes is not None:
            # Under Auto axes `init` may not have seen the mesh that is seen now. Then
            # every device makes the step of one: kernels for TPUs cannot be divided.
            alone, made_alone = self.expected(updates, state, None)
            if _validate_trees.is_like(state, made_alone):
                return placement.everywhere(updates, placed.mesh), alone
        _validate_trees.same_state(state, made, updates)
        return placed, space

    def expected(self, updates: Any, state: Any, placed: Any) -> tuple[Space, Any]:
        """Return the space for a placement, and what `state` should be like."""
        space = self.space(updates, _state_dtype(state), placed)
        local = jax.eval_shape(lambda: self.step.init(space))
        specs = self.step.specs(space)
        return space, description.global_arrays(local, specs, placed)


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

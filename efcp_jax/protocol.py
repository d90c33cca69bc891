"""A step as an Optax transformation: Optax's protocol, checks, and devices."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from efcp_jax import _validate_trees, numerics
from efcp_jax.compressors import Compressor, Space
from efcp_jax.devices import placement, spread
from efcp_jax.devices.collectives import vary_over, varying_axes
from efcp_jax.devices.placement import Placement, axes_of
from efcp_jax.devices.spread import Description, describing
from efcp_jax.devices.trees import strip_boxes


# The type that `optax.tree.map_params` initialises with, for parameters of any tree.
_found: list[type] = []
optax.tree.map_params(lambda tree: _found.append(type(tree)) or (), lambda x: x, ())
_STAND_IN = _found[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A transformation in terms of a space, which is made of the tree here."""

    compressor: Compressor  # makes a space of the layout of a tree
    init: Callable[[Space], Any]  # makes the state in front of the first step
    specs: Callable[[Space], Any]  # the `PartitionSpec` of each array of that state
    # From a space, updates, a state and the values of the hyperparameters to the next
    # updates and state.
    step: Callable[..., tuple[Any, Any]]
    hyperparameters: dict[str, Any]  # numbers, or schedules from the state's count
    sharding: Any  # where the parameters live, as in the arguments of users

    @property
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The step as a transformation, on one device or spread over many."""
        return optax.GradientTransformationExtraArgs(self.init_fn, self.update_fn)

    def init_fn(self, params: Any) -> Any:
        """Return the state of `params` in front of the first step."""
        params = strip_boxes(params)
        _validate_trees.floating_leaves(params)
        placed = placement.find(params, self.sharding)
        space = self._space(params, working_dtype(params), placed)
        if describing.get():  # as a leaf where it is held against one that is made
            known = not isinstance(params, _STAND_IN)
            return self._description(space, placed) if known else 0
        init, specs = functools.partial(self.init, space), self.specs(space)
        state = spread.start(placed, init, specs, params)
        state = vary_over(varying_axes(params), state)
        return _outline(state) if isinstance(params, _STAND_IN) else state

    def update_fn(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        """Return the update of the gradients `updates`, and the next state."""
        del extra_args
        given = jax.tree.structure(updates)
        updates, params = strip_boxes(updates), strip_boxes(params)
        like = updates if params is None else _beside(updates, params)
        _validate_trees.floating_leaves(updates, "updates")
        _validate_trees.same_trees(updates, like)
        placed, space = self._fitting(updates, like, state)
        values = {
            name: jnp.asarray(value(state.count) if callable(value) else value)
            for name, value in self.hyperparameters.items()
        }
        # Restored by a checkpointer, they may be arrays of NumPy.
        updates, state = jax.tree.map(jnp.asarray, (updates, state))
        taken = updates, state, values
        updates, state, values = vary_over(varying_axes(taken), taken)
        tree_specs, state_specs = PartitionSpec(), self.specs(space)
        if placed is not None:
            tree_specs = jax.tree.structure(updates).unflatten(placed.specs)
        made = tree_specs, state_specs
        step = functools.partial(self.step, space)
        step = spread.over(placed, step, (*made, PartitionSpec()), made)
        new, new_state = step(spread.enter(placed, updates), state, values)
        new = spread.leave(placed, new, updates, like)
        return given.unflatten(jax.tree.leaves(new)), new_state

    def _space(self, tree: Any, dtype: Any, placed: Placement | None) -> Space:
        return self.compressor.bind(placement.layout(tree, dtype, placed))

    def _description(self, space: Space, placed: Placement | None) -> Description:
        local = jax.eval_shape(lambda: self.init(space))
        sizes = {} if placed is None else dict(placed.mesh.shape)

        def whole(spec: PartitionSpec, leaf: Any) -> jax.ShapeDtypeStruct:
            shape = list(leaf.shape)
            for axis, entry in enumerate(spec):
                shape[axis] *= math.prod(sizes.get(name, 1) for name in axes_of(entry))
            return jax.ShapeDtypeStruct(shape, leaf.dtype)

        specs = self.specs(space)
        return Description(space, placed, jax.tree.map(whole, specs, local), specs)

    def _fitting(self, updates: Any, like: Any, state: Any) -> tuple[Any, Space]:
        """Return the placement and the space that `state` was made for."""
        placed = placement.find(like, self.sharding, updates, state)
        space, made = self._expected(updates, state, placed)
        fits = _validate_trees.is_like(state, made)
        if not fits and placed is not None and placed.shapes is not None:
            # Under Auto axes `init` may not have seen the mesh that is seen now. Then
            # every device makes the step of one: kernels for TPUs cannot be divided.
            alone, made_alone = self._expected(updates, state, None)
            if _validate_trees.is_like(state, made_alone):
                shapes = tuple(map(jnp.shape, jax.tree.leaves(updates)))
                specs = (PartitionSpec(),) * len(shapes)
                return Placement(placed.mesh, specs, shapes), alone
        _validate_trees.same_state(state, made, updates)
        return placed, space

    def _expected(self, updates: Any, state: Any, placed: Any) -> tuple[Space, Any]:
        """Return the space for a placement, and what `state` should be like."""
        held = jax.tree.leaves(getattr(state, "gram", state.error))
        dtype = numerics.widest(*(leaf.dtype for leaf in held[:1]))  # as `init` chose
        space = self._space(updates, dtype, placed)
        return space, self._description(space, placed).arrays


def _outline(state: Any) -> Any:
    """Return the fields of `state`, those whose structure is the parameters' as leaves.

    A tree prefix of every state of the transformation: dictionaries are named by leaves
    and their shapes. No field mirrors the parameters.
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

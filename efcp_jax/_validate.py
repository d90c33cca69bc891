"""Checks of configuration values, raised where the user stands.

Structural values (sizes, counts, dtypes) shape the arrays of the state, so they must
be Python values; hyperparameters may be traced and are checked when concrete.
"""

import math
import numbers
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np


# Leaves listed in a message about a whole tree.
_SHOWN = 6


def _reject_tracer(name: str, value: Any) -> None:
    if isinstance(value, (jax.Array, Tracer)):
        raise TypeError(
            f"`{name}` shapes the optimizer state, so it must be a Python value known"
            f" before tracing, got {value!r}. Under `optax.inject_hyperparams` name it"
            f" in `static_args`, for example `static_args=('{name}',)`."
        )


def positive_int(name: str, value: Any) -> int:
    """Return `value` as an int, or raise if it is not an integer of at least 1."""
    _reject_tracer(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be an integer >= 1, got {value!r} of type"
            f" {type(value).__name__}. Pass a whole number such as `{name}=32`."
        )
    if value < 1:
        raise ValueError(
            f"`{name}` must be an integer >= 1, got {value}. Pass at least `{name}=1`."
        )
    return int(value)


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float, or raise if it lies outside (0, 1]."""
    _reject_tracer(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`{name}` must be a number in (0, 1], got {value!r} of type"
            f" {type(value).__name__}. Pass a fraction such as `{name}=0.01`."
        )
    if not 0.0 < float(value) <= 1.0:
        raise ValueError(
            f"`{name}` must be in (0, 1], got {value}. To keep one entry in a hundred"
            f" pass `{name}=0.01`; to keep all of them pass `{name}=1.0`."
        )
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """Return `value`, or raise if it is not a Python bool."""
    _reject_tracer(name, value)
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def floating_dtype(name: str, value: Any) -> np.dtype | None:
    """Return `value` as a dtype, or raise if it is not a real floating dtype."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be a floating dtype such as jnp.bfloat16, got {value!r}."
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{name}` must be a real floating dtype, got {dtype}. Pass jnp.float32 or"
            " jnp.bfloat16."
        )
    return dtype


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return `value`, or raise if it is not one of the `allowed` strings."""
    if not isinstance(value, str) or value not in allowed:
        options = " or ".join(repr(option) for option in allowed)
        raise ValueError(f"`{name}` must be {options}, got {value!r}.")
    return value


def number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    remedy: str,
) -> Any:
    """Return `value`, or raise if it is concrete and outside its interval.

    Schedules and tracers pass: their values are not known here.
    """
    if callable(value) or isinstance(value, Tracer):
        return value
    interval = (
        f"{'(' if open_low else '['}{low:g}, {high:g}"
        f"{')' if open_high or math.isinf(high) else ']'}"
    )
    is_array = isinstance(value, (jax.Array, np.ndarray, np.generic))
    if isinstance(value, bool) or not (is_array or isinstance(value, numbers.Real)):
        raise TypeError(
            f"`{name}` must be a number in {interval} or a schedule, got {value!r} of"
            f" type {type(value).__name__}. {remedy}"
        )
    real = is_array and (
        jnp.issubdtype(value.dtype, jnp.floating)
        or jnp.issubdtype(value.dtype, jnp.integer)
    )
    if is_array and (value.ndim or not real):
        raise TypeError(
            f"`{name}` must be a scalar in {interval} or a schedule, got an array of"
            f" shape {value.shape} and dtype {value.dtype}. {remedy}"
        )
    concrete = float(value)
    above = concrete > low or (concrete == low and not open_low)
    below = concrete < high or (concrete == high and not open_high)
    if not (math.isfinite(concrete) and above and below):
        raise ValueError(f"`{name}` must be in {interval}, got {concrete}. {remedy}")
    return value


def floating_leaves(tree: Any, name: str = "params") -> None:
    """Raise, naming the leaf, if one of `tree` is not a floating or complex array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        try:
            dtype = _dtype(leaf)
        except TypeError as error:
            raise TypeError(
                f"`{name}` must be a tree of floating or complex arrays, got {leaf!r}"
                f" of type {type(leaf).__name__} at {name}{_name(path)}."
            ) from error
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"`{name}` must be floating or complex arrays, got dtype {dtype} at"
                f" {name}{_name(path)}. Keep it out of the optimizer, for example with"
                " `optax.masked` or `nnx.Optimizer(wrt=nnx.Param)`."
            )


def same_trees(updates: Any, params: Any) -> None:
    """Raise, naming the leaf, if a gradient does not belong to its parameter.

    Structure and shapes must agree, and a gradient must be real or complex as its
    parameter is; its floating dtype may differ, as in mixed precision.
    """
    remedy = "Pass gradients of the tree that `init` was called with."
    expected = dict(_leaves(params))
    received = dict(_leaves(updates))
    for path in expected.keys() - received.keys():
        raise ValueError(f"`updates` lacks the leaf at params{path}. {remedy}")
    for path, leaf in received.items():
        if path not in expected:
            raise ValueError(
                f"`updates` has a leaf at updates{path} that `params` lacks. {remedy}"
            )
        like = expected[path]
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"The gradient at updates{path} has shape {jnp.shape(leaf)} but its"
                f" parameter has shape {jnp.shape(like)}. {remedy}"
            )
        dtype, like_dtype = _dtype(leaf), _dtype(like)
        if _is_complex(dtype) != _is_complex(like_dtype):
            raise ValueError(
                f"The gradient at updates{path} has dtype {dtype} but its parameter"
                f" has dtype {like_dtype}: one is complex and the other is not."
                f" {remedy}"
            )
    _same_nodes("updates", updates, params, remedy)


def same_state(state: Any, expected: Any, updates: Any) -> None:
    """Raise, naming the leaf, if `state` was not made by `init` for such `updates`.

    A packed state knows how many numbers the parameters have, not their tree; the
    low-rank state mirrors the tree.

    Args:
        state: The state given to `update`.
        expected: What `init` would return, arrays or their shapes.
        updates: The gradients, for the message.
    """
    leaves = [f"updates{path} {jnp.shape(leaf)}" for path, leaf in _leaves(updates)]
    given = ", ".join(leaves[:_SHOWN]) + (", ..." if len(leaves) > _SHOWN else "")
    remedy = (
        f" The gradients are {given or 'an empty tree'}. Call `init` with the"
        " parameters that are updated, on a transformation of the same arguments, or"
        " `efcp_jax.sharding.reshard_state` on a state saved with another number of"
        " devices."
    )
    text = "The optimizer state does not fit the tree given to `update`:"
    received, wanted = dict(_leaves(state)), dict(_leaves(expected))
    for path in [p for p in wanted if p not in received]:
        raise ValueError(f"{text} it lacks state{path}.{remedy}")
    for path, leaf in received.items():
        if path not in wanted:
            raise ValueError(f"{text} it has a surplus leaf state{path}.{remedy}")
        like = wanted[path]
        if jnp.shape(leaf) != like.shape:
            raise ValueError(
                f"{text} state{path} has shape {jnp.shape(leaf)}, expected"
                f" {like.shape}.{remedy}"
            )
        if _dtype(leaf) != like.dtype:
            raise ValueError(
                f"{text} state{path} has dtype {_dtype(leaf)}, expected"
                f" {like.dtype}.{remedy}"
            )
    _same_nodes("state", state, expected, remedy)


def _same_nodes(name: str, tree: Any, like: Any, remedy: str) -> None:
    """Raise if two trees with the same leaves have containers of different types."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if structure != expected:
        raise ValueError(
            f"The containers of `{name}` differ from those expected: got {structure},"
            f" expected {expected}. {remedy.strip()}"
        )


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path)


def _dtype(leaf: Any) -> Any:
    """Return the dtype of an array, a Python number or a `jax.ShapeDtypeStruct`."""
    dtype = getattr(leaf, "dtype", None)
    return jnp.result_type(leaf) if dtype is None else dtype


def _is_complex(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))

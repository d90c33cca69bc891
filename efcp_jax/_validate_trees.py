"""Checks of trees, raised where the user stands, with the name of the leaf."""

from typing import Any

import jax
import jax.numpy as jnp


# Leaves listed in a message about a whole tree.
_SHOWN = 6


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
        _no_bytes(f"{name}{_name(path)}", dtype)
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


def is_like(state: Any, expected: Any) -> bool:
    """Return whether `state` has the structure and the shapes of `expected`."""
    shapes = lambda tree: list(map(jnp.shape, jax.tree.leaves(tree)))
    alike = jax.tree.structure(state) == jax.tree.structure(expected)
    return alike and shapes(state) == shapes(expected)


def same_state(state: Any, expected: Any, updates: Any) -> None:
    """Raise, naming the leaf, if `state` was not made by `init` for such `updates`.

    A packed state knows how many numbers the parameters have, a low-rank state the
    shapes of their matrices and how many there are of each, neither their tree.

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
        _no_bytes(f"state{path}", _dtype(leaf), like.dtype)
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


def _no_bytes(name: str, dtype: Any, wanted: Any = "bfloat16") -> None:
    """Raise if `dtype` is that of bytes that have lost their type."""
    if getattr(dtype, "kind", "") == "V" and not jnp.issubdtype(dtype, jnp.number):
        raise ValueError(
            f"{name} holds bytes without a type, {dtype}, as `np.load` returns numbers"
            " that NumPy has no dtype of its own for. View them as what they were, for"
            f" example `array.view(jnp.{wanted})`, before they are passed."
        )


def _is_complex(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))

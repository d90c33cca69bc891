"""Checks of trees, raised where the user stands, with the name of the leaf."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


# Leaves listed in a message about a whole tree.
_SHOWN = 6


def floating_leaves(tree: Any, name: str = "params") -> None:
    """Raise, naming the leaf, if one of `tree` is not a floating or complex array."""
    for path, leaf in _leaves(tree).items():
        try:
            dtype = _dtype(leaf)
        except TypeError as error:
            raise TypeError(
                f"`{name}` must be a tree of floating or complex arrays, got {leaf!r}"
                f" of type {type(leaf).__name__} at {name}{path}."
            ) from error
        _no_bytes(f"{name}{path}", dtype)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"`{name}` must be floating or complex arrays, got dtype {dtype} at"
                f" {name}{path}. Keep it out of the optimizer, for example with"
                " `optax.masked` or `nnx.Optimizer(wrt=nnx.Param)`."
            )


def same_trees(updates: Any, params: Any) -> None:
    """Raise, naming the leaf, if a gradient does not belong to its parameter.

    Structure and shapes must agree, and a gradient must be real or complex as its
    parameter is; its floating dtype may differ, as in mixed precision.
    """
    is_complex = lambda dtype: jnp.issubdtype(dtype, jnp.complexfloating)
    _same(
        ("updates", updates),
        ("params", params),
        lambda dtype, like: is_complex(dtype) == is_complex(like),
        "The gradients do not fit the parameters:",
        "Pass gradients of the tree that `init` was called with.",
    )


def is_like(state: Any, expected: Any) -> bool:
    """Return whether `state` has the structure and the shapes of `expected`."""
    shapes = lambda tree: list(map(jnp.shape, jax.tree.leaves(tree)))
    alike = jax.tree.structure(state) == jax.tree.structure(expected)
    return alike and shapes(state) == shapes(expected)


def same_state(state: Any, expected: Any, updates: Any) -> None:
    """Raise, naming the leaf, if `state` is not like what `init` makes of `updates`.

    A packed state knows how many numbers the parameters have, a low-rank state the
    shapes of their matrices and how many there are of each, neither their tree.
    """
    each = [f"updates{p} {jnp.shape(leaf)}" for p, leaf in _leaves(updates).items()]
    given = ", ".join(each[:_SHOWN]) + (", ..." if len(each) > _SHOWN else "")
    _same(
        ("state", state),
        ("state", expected),
        lambda dtype, like: dtype == like,
        "The optimizer state does not fit the tree given to `update`:",
        f"The gradients are {given or 'an empty tree'}. Call `init` with the"
        " parameters that are updated, on a transformation of the same arguments, or"
        " `efcp_jax.sharding.reshard_state` on a state saved with another number of"
        " devices.",
    )


def _same(
    given: tuple[str, Any],
    wanted: tuple[str, Any],
    agree: Callable[[Any, Any], bool],
    problem: str,
    remedy: str,
) -> None:
    """Raise if two trees, each with its name, differ in a leaf or their containers.

    The dtypes of leaves must `agree`. A message goes from the problem to the remedy.
    """
    (name, tree), (like_name, like) = given, wanted
    fail = lambda what: ValueError(f"{problem} {what}. {remedy}")
    leaves, like_leaves = _leaves(tree), _leaves(like)
    for path in like_leaves:
        if path not in leaves:
            raise fail(f"`{name}` lacks {like_name}{path}")
    for path, leaf in leaves.items():
        if path not in like_leaves:
            raise fail(f"there is a surplus leaf {name}{path}")
        shape, like_shape = jnp.shape(leaf), jnp.shape(like_leaves[path])
        if shape != like_shape:
            raise fail(f"{name}{path} has shape {shape}, expected {like_shape}")
        dtype, like_dtype = _dtype(leaf), _dtype(like_leaves[path])
        _no_bytes(f"{name}{path}", dtype, like_dtype)
        if not agree(dtype, like_dtype):
            raise fail(f"{name}{path} has dtype {dtype}, expected {like_dtype}")
    structure, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if structure != expected:
        raise fail(
            f"the containers of `{name}` differ from those expected: got {structure},"
            f" expected {expected}"
        )


def _leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


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

"""States that version 0.1.0 saved, in the shapes of today.

Fields have kept their names and meaning. Rows of a window lie end to end now, sparse
rows of small blocks in tiles, and factors of equal shape in one array.
"""

from typing import Any

import jax
import numpy as np

from efcp_jax.devices.description import Description
from efcp_jax.devices.reshard import moved


def upgrade(saved: Any, described: Any) -> Any:
    """Return `saved` in the structure and the shapes of `described`.

    Args:
        saved: Nested dictionaries, lists, tuples and arrays, or a state.
        described: The state of today, with `Description`s for leaves.

    Returns:
        A state of NumPy arrays.

    Raises:
        ValueError: A part of the state is missing.
    """
    found, treedef = jax.tree_util.tree_flatten_with_path(
        described, is_leaf=lambda node: isinstance(node, Description)
    )
    return treedef.unflatten(_part(saved, path, leaf) for path, leaf in found)


def _part(saved: Any, path: Any, leaf: Any) -> Any:
    """Return what was saved at `path`; of a transformation of ours, upgraded."""
    part = saved
    for key in path:
        part = _child(part, jax.tree_util.keystr((key,), simple=True), path)
    if not isinstance(leaf, Description):
        return np.asarray(part)
    state = _named(leaf.arrays, part, path)
    if hasattr(leaf.arrays, "window"):
        state = state._replace(window=_named(leaf.arrays.window, state.window, path))
    return moved(state, leaf.space.upgrader(), leaf.arrays)


def _named(like: Any, part: Any, path: Any) -> Any:
    """Return the fields of `part` as a named tuple like `like`."""
    new = {"metric"} if getattr(like, "metric", None) is None else set()
    fields = [name for name in like._fields if name not in new]
    return type(like)(**{name: _child(part, name, path) for name in fields})


def _child(part: Any, name: str, path: Any) -> Any:
    """Return what `part` calls `name`: a key, a field, or a number."""
    if isinstance(part, dict) and name in part:
        return part[name]
    if hasattr(part, name):
        return getattr(part, name)
    if isinstance(part, list | tuple) and name.isdigit() and int(name) < len(part):
        return part[int(name)]
    raise ValueError(
        f"`saved` has no {name!r} on the way to state{jax.tree_util.keystr(path)}. Pass"
        " the whole state that was saved, and the transformation that made it."
    )

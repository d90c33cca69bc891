"""The state of a transformation, described instead of made.

What knows the parameters' placement can tell the placement of the state: that is how
`efcp_jax.sharding` finds shardings and shapes without arrays.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from efcp_jax.devices.placement import Placement, axes_of
from efcp_jax.devices.spread import run


@dataclasses.dataclass(frozen=True)
class Description:
    """The state of one transformation, described instead of made.

    Attributes:
        space: The representation, which knows the layout.
        placement: Where the state lives; None on one device.
        arrays: `jax.ShapeDtypeStruct`s of the global arrays, in the state's structure.
        specs: One `PartitionSpec` an array.
    """

    space: Any
    placement: Placement | None
    arrays: Any
    specs: tuple[PartitionSpec, ...]


_DESCRIBING = contextvars.ContextVar("efcp_jax_describing", default=False)


@contextlib.contextmanager
def describing() -> Iterator[None]:
    """Let every `init` of this package return a `Description` for its state."""
    token = _DESCRIBING.set(True)
    try:
        yield
    finally:
        _DESCRIBING.reset(token)


def asked() -> bool:
    """Return whether states are to be described instead of made."""
    return _DESCRIBING.get()


def start(
    init: Callable[[Any], Any],
    space: Any,
    placement: Placement | None,
    specs: Any,
    params: Any,
) -> Any:
    """Return the state `init(space)` of `params`, made on each device for itself."""
    if asked():
        arrays = global_arrays(jax.eval_shape(lambda: init(space)), specs, placement)
        return Description(space, placement, arrays, tuple(_spec_leaves(specs)))
    return run(lambda: init(space), placement, (), specs, beside=params)


def global_arrays(local: Any, specs: Any, placement: Placement | None) -> Any:
    """Return the `jax.ShapeDtypeStruct`s of arrays whose parts on a device are given.

    Args:
        local: Tree of arrays or structs, the parts of one device.
        specs: Tree of `PartitionSpec`s, a prefix of `local`.
        placement: The mesh; None on one device.

    Returns:
        Tree of the structure of `local`.
    """
    sizes = {} if placement is None else dict(placement.mesh.shape)

    def whole(spec: PartitionSpec, leaf: Any) -> jax.ShapeDtypeStruct:
        ways = [math.prod(sizes.get(a, 1) for a in axes_of(entry)) for entry in spec]
        ways += [1] * (len(leaf.shape) - len(ways))
        shape = tuple(n * w for n, w in zip(leaf.shape, ways, strict=True))
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    leaves, treedef = jax.tree.flatten(local)
    pairs = zip(_spec_leaves(specs), leaves, strict=True)
    return treedef.unflatten([whole(*pair) for pair in pairs])


def _spec_leaves(specs: Any) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))

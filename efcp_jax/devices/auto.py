"""Where a step is spread if nothing says where the parameters live.

Under Auto mesh axes the types of traced arrays name the mesh, but not which of its axes
divide which array axis. So the step divides every leaf in a way of its own, which
follows from the leaf's shape and the mesh alone: however the parameters are placed, and
whether `init` and `update` are traced or not, the state has the same layout. The
partitioner carries the gradient there and the update back, a device's share of each.

Small trees are brought to every device whole, which then works on its share of them, so
that the results are those of one device, blocks and all. In larger ones a leaf is
divided along its first or last axis, or both, over all mesh axes; it is padded with
zeros where they do not divide it. Zeros are never selected, add nothing to inner
products, and are cut off again.
"""

from collections.abc import Iterable
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


# Trees of up to this many entries are brought to every device.
GATHERED = 2**20


class Division(NamedTuple):
    """How one leaf is divided among all devices of a mesh.

    Attributes:
        spec: The mesh axes of each array axis.
        shape: The shape that the leaf is padded to.
    """

    spec: PartitionSpec
    shape: tuple[int, ...]


def mesh_of(leaves: Iterable[Any]) -> Any:
    """Return the mesh with Auto axes that the types of `leaves` name, or None.

    A concrete mesh if one of the arrays is concrete. While a function is traced, leaves
    that name no mesh live on the ambient one.
    """
    leaves = list(leaves)
    meshes = [at.mesh for at in map(sharding_of, leaves) if at is not None]
    if not meshes and any(isinstance(leaf, Tracer) for leaf in leaves):
        meshes = [jax.sharding.get_abstract_mesh()]
    meshes = [mesh for mesh in meshes if set(mesh.axis_types) == {AxisType.Auto}]
    if not meshes or meshes[0].size == 1:
        return None
    if any(dict(mesh.shape) != dict(meshes[0].shape) for mesh in meshes):
        return None
    concrete = (mesh for mesh in meshes if isinstance(mesh, jax.sharding.Mesh))
    return next(concrete, meshes[0])


def sharding_of(leaf: Any) -> NamedSharding | None:
    """Return the sharding on a mesh that a leaf has, or a traced one in its type."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
    known = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    return sharding if known else None


def divide(leaves: list[tuple[Any, Any]], sizes: dict[str, int]) -> list[Division]:
    """Return how leaves, shapes and dtypes, are divided on a mesh of axes `sizes`."""
    if sum(math.prod(shape) for shape, _ in leaves) <= GATHERED:
        return [Division(PartitionSpec(), shape) for shape, _ in leaves]
    return [_divide(shape, dtype, sizes) for shape, dtype in leaves]


def _divide(shape: tuple[int, ...], dtype: Any, sizes: dict[str, int]) -> Division:
    """Return how a leaf is divided among all devices.

    With as little padding as there can be, and then with the shortest sides, which
    makes low-rank factors small.
    """
    shape = shape or (1,)
    names = [name for name, size in sizes.items() if size > 1]
    # The real and imaginary parts of a complex leaf lie side by side.
    sides = [0] if jnp.issubdtype(dtype, jnp.complexfloating) else [0, len(shape) - 1]
    best = None
    for choice in itertools.product(sorted(set(sides)), repeat=len(names)):
        axes: list[list[str]] = [[] for _ in shape]
        for name, axis in zip(names, choice, strict=True):
            axes[axis].append(name)
        ways = [math.prod(sizes[name] for name in each) for each in axes]
        local = [-(-n // way) for n, way in zip(shape, ways, strict=True)]
        cost = math.prod(local), math.prod(local[:-1]) + local[-1]
        if best is None or cost < best[0]:
            padded = (n * way for n, way in zip(local, ways, strict=True))
            spec = PartitionSpec(*(tuple(each) or None for each in axes))
            best = cost, Division(spec, tuple(padded))
    assert best is not None
    return best[1]


def pad(value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return `value` padded with zeros to `shape`."""
    value = jnp.asarray(value)
    if value.shape == shape:
        return value
    value = value.reshape(value.shape or (1,))
    missing = [(0, n - m) for n, m in zip(shape, value.shape, strict=True)]
    return jnp.pad(value, missing)


def cut(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `pad`, where `shape` is that of the leaf."""
    if value.shape == shape:
        return value
    return value[tuple(slice(n) for n in shape or (1,))].reshape(shape)

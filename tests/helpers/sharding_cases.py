"""Meshes, partitions and gradients for the tests of many devices."""

import functools
import itertools
from typing import Any, NamedTuple

from cases import WIDE
import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import oracles

import efcp_jax


WINDOW = 4
STEPS = 7
DENSITY, BLOCK = 0.25, 4

SHAPES = {"b": (16,), "k": (2, 8, 8), "w": (8, 16)}


class Placing(NamedTuple):
    """A mesh, the partition of each parameter, and how many devices share a window."""

    mesh: dict[str, int]
    specs: dict[str, P]

    def make_mesh(self, kind: AxisType = AxisType.Explicit) -> jax.sharding.Mesh:
        count = int(np.prod(list(self.mesh.values())))
        return jax.make_mesh(
            tuple(self.mesh.values()),
            tuple(self.mesh),
            axis_types=(kind,) * len(self.mesh),
            devices=jax.devices()[:count],
        )

    def shardings(self, mesh: Any) -> dict[str, NamedSharding]:
        return {name: NamedSharding(mesh, spec) for name, spec in self.specs.items()}

    @property
    def idle(self) -> list[str]:
        """The mesh axes that shard nothing."""
        used = {
            a for spec in self.specs.values() for entry in spec for a in _tuple(entry)
        }
        return [axis for axis, n in self.mesh.items() if axis not in used and n > 1]

    def local(self, name: str, at: dict[str, int]) -> np.ndarray:
        """Return the positions in the leaf of what the device `at` holds."""
        numbers = np.arange(np.prod(SHAPES[name])).reshape(SHAPES[name])
        for dimension, entry in enumerate(self.specs[name]):
            for axis in _tuple(entry):
                numbers = np.split(numbers, self.mesh[axis], dimension)[at[axis]]
        return numbers.reshape(-1)

    def segments(self) -> list[np.ndarray]:
        """Return the runs of entries that are cut into blocks, each run once."""
        ends = np.cumsum([0, *map(np.prod, SHAPES.values())])
        starts = dict(zip(SHAPES, ends[:-1], strict=True))
        found = {}
        for numbers in itertools.product(*map(range, self.mesh.values())):
            at = dict(zip(self.mesh, numbers, strict=True))
            groups: dict[int, list] = {}
            for name, spec in self.specs.items():
                ways = [self.mesh[a] for entry in spec for a in _tuple(entry)]
                run = starts[name] + self.local(name, at)
                groups.setdefault(int(np.prod(ways)), []).append(run)
            for runs in groups.values():
                run = np.concatenate(runs)
                found[run.tobytes()] = run
        return list(found.values())


def _tuple(entry: Any) -> tuple:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


REPLICATED = dict.fromkeys(SHAPES, P())
PLACINGS = {
    "data": Placing({"x": 8}, REPLICATED),
    "fsdp": Placing({"x": 8}, {"b": P("x"), "k": P(None, "x"), "w": P("x")}),
    "tensor": Placing(
        {"x": 8}, {"b": P("x"), "k": P(None, None, "x"), "w": P(None, "x")}
    ),
    "fsdp x tensor": Placing(
        {"x": 4, "y": 2},
        {"b": P(("x", "y")), "k": P("y", "x"), "w": P("x", "y")},
    ),
    "mixed": Placing({"x": 8}, {"b": P(), "k": P(None, None, "x"), "w": P("x")}),
    "tensor and data": Placing(
        {"x": 4, "y": 2}, {"b": P("y"), "k": P(None, None, "y"), "w": P(None, "y")}
    ),
    "unit axes": Placing(
        {"x": 1, "y": 4, "z": 1}, {"b": P("y"), "k": P("x", "y"), "w": P("y", "z")}
    ),
}

# Rounded to bfloat16, sums in another order would differ by more than in their order.
ALIASES = {
    "mfac": functools.partial(efcp_jax.mfac, 1.0, WINDOW, 0.1),
    "sparse_mfac": functools.partial(
        efcp_jax.sparse_mfac, 1.0, WINDOW, DENSITY, 0.1, block_size=BLOCK, **WIDE
    ),
    "low_rank_mfac": functools.partial(efcp_jax.low_rank_mfac, 1.0, WINDOW, 2, 0.1),
    "ggt": functools.partial(efcp_jax.ggt, 1.0, WINDOW, 0.1, b1=0.5, b2=0.9),
    "sparse_ggt": functools.partial(
        efcp_jax.sparse_ggt, 1.0, WINDOW, DENSITY, 0.1, block_size=BLOCK, **WIDE
    ),
    "low_rank_ggt": functools.partial(efcp_jax.low_rank_ggt, 1.0, WINDOW, 2, 0.1),
}


def params() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def gradients(steps: int = STEPS, seed: int = 0) -> dict[str, np.ndarray]:
    """Return `steps` gradients, stacked."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(size=(steps, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def train(tx: Any, model: Any, stacked: Any) -> tuple[Any, Any]:
    """Return the updates of all steps, stacked, and the last state.

    A scan, so the state must keep shapes, dtypes and, under Explicit axes, shardings.
    """

    def step(state, gradient):
        updates, state = tx.update(gradient, state, model)
        return state, updates

    state, updates = lax.scan(step, tx.init(model), stacked)
    return updates, state


def train_on(placing: Placing, make: Any, stacked: Any, kind: AxisType) -> Any:
    """Return the updates and the last state of a run on the devices of `placing`."""
    mesh = placing.make_mesh(kind)
    shardings = placing.shardings(mesh)
    stack = {
        name: NamedSharding(mesh, P(None, *spec))
        for name, spec in placing.specs.items()
    }
    tx = make(sharding=None if kind == AxisType.Explicit else shardings)
    with jax.set_mesh(mesh):
        return jax.jit(lambda model, grads: train(tx, model, grads))(
            jax.device_put(params(), shardings), jax.device_put(stacked, stack)
        )


def vectors(stacked: Any) -> list[np.ndarray]:
    """Return the flat vector of each step."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stacked)]
    return [
        np.concatenate([leaf[i].ravel() for leaf in leaves])
        for i in range(leaves[0].shape[0])
    ]


def oracle(alias: str, placing: Placing, stacked: Any) -> list[np.ndarray]:
    """Return the updates in float64, with `d x d` matrices and blocks cut by hand."""
    rows = [row.astype(np.float32) for row in vectors(stacked)]
    if alias.startswith("sparse"):

        def compress(vector):
            result = np.zeros_like(vector)
            runs = placing.segments()
            lanes = oracles.lanes_of(max(map(len, runs)), BLOCK)
            for run in runs:
                result[run] = oracles.top_k(vector[run], DENSITY, BLOCK, None, lanes)
            return result

        rows, _ = oracles.with_feedback(compress, rows)
    updates = []
    for t in range(len(rows)):
        window = rows[max(0, t + 1 - WINDOW) : t + 1]
        if alias.endswith("mfac"):
            updates.append(-oracles.mfac(window, 0.1, WINDOW))
        else:
            decays = (0.5, 0.9) if alias == "ggt" else (0.0, 1.0)
            updates.append(-oracles.ggt(window, 0.1, *decays))
    return updates


def worst(values: list, expected: list) -> float:
    """Return the largest relative error of the steps."""
    return max(map(oracles.relative_error, values, expected))

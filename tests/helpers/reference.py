"""Random runs of many configurations at once, judged against float64.

A *structure* fixes every array shape, so all its runs share one compilation. A
*configuration* is a structure with its hyperparameters and a history of gradients,
faults among them. The judge never compresses: it reads from a run which gradients and
errors there were, checks that what lies between is a legal compression, and solves for
the updates with dense float64 matrices.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import oracles

import efcp_jax


STEPS = 9

TREES = {
    "scalar": {"a": ()},
    "one": {"a": (1,)},
    "vector": {"a": (13,)},
    "matrix": {"a": (9, 2)},
    "mixed": {"a": (4, 3), "b": (5,), "c": ()},
    "kernel": {"a": (2, 3, 4), "b": (4,)},
}
COMPRESSORS = {
    "dense": {},
    "dense-bf16": {"value_dtype": jnp.bfloat16},
    "sparse": {"density": 0.2},
    "sparse-one": {"density": 1e-6},
    "sparse-blocks": {"density": 0.3, "block_size": 4},
    "sparse-blocks-f16": {
        "density": 0.3,
        "block_size": 1000,
        "value_dtype": jnp.float16,
    },
    "rank-1": {"rank": 1},
    "rank-2": {"rank": 2, "value_dtype": jnp.bfloat16},
    "rank-9": {"rank": 9},
}

# Multiples of the first-order rounding error that a run may be off by.
_SLACK = 40.0
# A predicted error above this is no prediction; then only bounds are checked.
_USELESS = 0.03


class Structure(NamedTuple):
    """What the shapes of a run depend on."""

    kind: str
    compressor: str
    tree: str
    window: int
    dtype: str


class Judgement(NamedTuple):
    """Whether a run kept its contract, and whether all steps could be compared."""

    failure: str | None
    compared: bool


def compressor(name: str):
    """Return the compressor called `name`."""
    make = {"dense": efcp_jax.identity, "sparse": efcp_jax.top_k}
    return make.get(name.split("-")[0], efcp_jax.low_rank)(**COMPRESSORS[name])


@functools.cache
def runner(structure: Structure):
    """Return a compiled function from hyperparameters and gradients to a run."""
    shapes = TREES[structure.tree]
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    dtype = jnp.dtype(structure.dtype)
    params = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}

    def flat(tree):
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    def one(values, history):
        strength, b1, b2 = values
        settings = {"compressor": compressor(structure.compressor)}
        if structure.kind == "mfac":
            tx = efcp_jax.scale_by_mfac(structure.window, strength, **settings)
        else:
            tx = efcp_jax.scale_by_ggt(
                structure.window, strength, b1=b1, b2=b2, **settings
            )

        def step(state, vector):
            parts = jnp.split(vector, np.cumsum(sizes)[:-1])
            each = zip(shapes.items(), parts, strict=True)
            gradient = {name: part.reshape(shape) for (name, shape), part in each}
            update, state = tx.update(gradient, state, params)
            error = jnp.zeros(sum(sizes))
            if state.error is not None:
                error = flat(state.error)[: sum(sizes)]
            return state, (flat(update), error, state.skipped)

        return lax.scan(step, tx.init(params), history)[1]

    return jax.jit(jax.vmap(one))


def run(structure: Structure, values: np.ndarray, history: np.ndarray):
    """Return `(updates, errors, skipped)` of a batch of runs, as NumPy arrays.

    Args:
        structure: The shapes.
        values: Damping or eps, b1 and b2, shape `(batch, 3)`.
        history: Gradients in the structure's dtype, shape `(batch, STEPS, d)`.
    """
    result = runner(structure)(tuple(jnp.asarray(values.T, jnp.float32)), history)
    return tuple(np.asarray(part) for part in result)


def size(structure: Structure) -> int:
    """Return the number of parameters."""
    return sum(int(np.prod(shape)) for shape in TREES[structure.tree].values())


def judge(structure: Structure, values, history, updates, errors, skipped) -> Judgement:
    """Check one run step by step; arrays of shape `(STEPS, d)`."""
    strength, b1, b2 = (float(np.float32(value)) for value in values)
    error = np.zeros(history.shape[1], np.float32)
    rows: list[np.ndarray] = []
    noise, count, compared = 1.0, 0, True
    for t in range(len(history)):
        gradient, update = history[t].astype(np.float32), updates[t]
        fail = functools.partial(_failure, t)
        with np.errstate(all="ignore"):
            total = error + gradient
        if not np.all(np.isfinite(np.asarray(updates[t], np.float32))):
            return fail("the update is not finite")
        if not np.all(np.isfinite(errors[t])):
            return fail("the error is not finite")
        if not np.all(np.isfinite(total)):
            count += 1
            unchanged = np.array_equal(errors[t], error) and not np.any(update)
            if not unchanged or skipped[t] != count:
                return fail("a gradient that is not finite was not skipped")
            continue
        if skipped[t] != count:
            return fail("a finite gradient was skipped")
        # Both are float32 numbers, so the difference is exact in float64.
        row = total.astype(np.float64) - errors[t].astype(np.float64)
        illegal = _illegal(structure, total, row, errors[t])
        if illegal:
            return fail(illegal)
        error = errors[t]
        rows = [*rows, row][-structure.window :]
        if "rank" in structure.compressor and np.any(row):
            # A low-rank error is rounded itself, and the row is read from it.
            whole = np.linalg.norm(total.astype(np.float64))
            noise = max(noise, whole / np.linalg.norm(row))
        bad, sharp = _wrong_update(structure, strength, b1, b2, rows, noise, update)
        compared = compared and sharp
        if bad:
            return fail(bad)
    return Judgement(None, compared)


def _failure(step: int, reason: str) -> Judgement:
    return Judgement(f"step {step}: {reason}", True)


def _illegal(structure, total, row, error) -> str | None:
    """Say what is wrong with `row` as a compression of `total`, or None."""
    given = COMPRESSORS[structure.compressor]
    if "rank" in given:
        return _illegal_low_rank(structure, total, row, given["rank"])
    if structure.compressor == "dense":
        return "identity left an error" if np.any(error) else None
    step = jnp.finfo(given.get("value_dtype", jnp.float32)).eps
    block = min(given.get("block_size", len(row)), len(row))
    kept = max(1, round(given.get("density", 1.0) * block))
    # Values far below the largest may fall under the smallest of a narrow dtype.
    tiny = 1e-7 * float(np.max(np.abs(total)))
    for part in map(list, oracles.blocks(len(row), block)):
        chosen = np.abs(row[part]) > 0
        off = np.abs(error[part][chosen])
        if np.sum(chosen) > kept:
            return "more than k entries of a block were kept"
        if np.any(off > step * np.abs(total[part][chosen]) + tiny):
            return "a kept entry was rounded by more than its dtype rounds"
        largest = np.sort(np.abs(total[part].astype(np.float64)))[::-1]
        dropped = np.abs(total[part][~chosen])
        if len(dropped) and np.max(dropped) > max(largest[kept - 1], tiny):
            return "an entry larger than a kept one was dropped"
    return None


def _illegal_low_rank(structure, total, row, rank) -> str | None:
    start = 0
    for shape in TREES[structure.tree].values():
        part = slice(start, start + int(np.prod(shape)))
        start = part.stop
        columns = shape[-1] if shape else 1
        kept = row[part].reshape(-1, columns)
        whole = total[part].astype(np.float64).reshape(-1, columns)
        norm = np.linalg.norm(total.astype(np.float64))
        if rank * sum(kept.shape) >= kept.size:
            if np.linalg.norm(whole - kept) > 1e-2 * norm:
                return "a leaf that is kept whole was compressed"
            continue
        if np.sum(np.linalg.svd(kept)[1] > 1e-5 * norm) > rank:
            return "the compressed matrix has too high a rank"
        if np.linalg.norm(kept) > 1.02 * np.linalg.norm(whole) + 1e-6 * norm:
            return "a projection is longer than what it projects"
    return None


def _wrong_update(structure, strength, b1, b2, rows, noise, update):
    """Return what is wrong with `update`, or None, and whether it was compared."""
    unit, size = float(np.finfo(np.float32).eps), structure.window
    with np.errstate(all="ignore"):
        if structure.kind == "mfac":
            expected, relative = _mfac(rows, strength, size)
            bound = 1.05 * np.sqrt(size / strength)
        else:
            expected, relative, bound = _ggt(rows, strength, b1, b2)
        relative *= _SLACK * unit * noise
    info = jnp.finfo(structure.dtype)
    largest = float(info.max)
    # Below this the dtype of the update, or the hardware, flushes to zero.
    floor = 4 * float(info.tiny) * np.sqrt(len(update))
    value = np.asarray(update).astype(np.float64)
    if np.linalg.norm(value) > bound + floor:
        return (
            f"the update is {np.linalg.norm(value):.3g} long, above {bound:.3g}",
            True,
        )
    if not relative < _USELESS:
        return None, False
    expected = np.clip(expected, -largest, largest)
    allowed = (relative + 2 * float(info.eps)) * np.linalg.norm(expected) + floor
    off = np.linalg.norm(value - expected)
    if off > allowed:
        return f"the update is off by {off:.3g}, allowed {allowed:.3g}", True
    return None, True


def _mfac(rows, damping, divisor) -> tuple[np.ndarray, float]:
    """Return the update, and its first-order error in rounding units."""
    window = np.array(rows)
    scale = 1 / np.sqrt(damping + np.sum(window**2, axis=1) / divisor)
    scaled = scale[:, None] * window
    matrix = np.diag(damping * scale**2) + scaled @ scaled.T / divisor
    condition = float(np.linalg.cond(matrix))
    if not condition < 1e12:  # float64 would not know the answer either
        return np.zeros(len(rows[-1])), np.inf
    weights = np.linalg.solve(matrix, np.eye(len(rows))[-1]) * scale[-1]
    update = scaled.T @ weights
    # The update may be a small difference of the rows that are combined.
    terms = np.linalg.norm(scaled) * np.linalg.norm(weights)
    return update, condition * terms / max(np.linalg.norm(update), 1e-300)


def _ggt(rows, eps, b1, b2) -> tuple[np.ndarray, float, float]:
    """Return the update, its first-order error in rounding units, and its bound."""
    age = np.arange(len(rows) - 1, -1, -1)
    faded = b2 ** age[:, None] * np.array(rows)
    moment = (1 - b1) * (b1 / b2) ** age
    # From the moment in terms of the faded rows, so that nothing is divided that is
    # not first multiplied by the same singular value.
    left, singular, right = np.linalg.svd(faded, full_matrices=False)
    update = right.T @ (singular / (singular + eps) * (left.T @ moment))
    # Exactly it is the length of the moment. Near the floor of what is resolved, a
    # singular value may be off by a factor of about the root of two.
    bound = 2 * float(np.linalg.norm(moment))
    largest = singular[0]
    if largest == 0:
        return update, 1.0, bound
    rank = np.sum(singular > 1e-13 * largest)
    norms = np.linalg.norm(faded, axis=1)
    units = faded[norms > 0] / norms[norms > 0, None]
    if np.sum(np.linalg.svd(units)[1] > 1e-10) > rank:
        return update, np.inf, bound  # a short row, below what is resolved
    dependent = rank < len(units)
    spread = largest / (singular[singular > 1e-13 * largest][-1] + eps)
    # Dependent rows: what rounding leaks into their null space is divided by the floor.
    floor = np.sqrt(np.finfo(np.float32).eps) * largest
    leak = largest / (floor + eps) if dependent else 0.0
    size = max(np.linalg.norm(update), 1e-300)
    return update, (spread + spread**2 + leak) * np.linalg.norm(moment) / size, bound

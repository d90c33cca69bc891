"""The compressors, models, gradients and runs that the tests share."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import oracles

import efcp_jax
from efcp_jax.compressors import ROW_AXIS, TopK, scoped
from efcp_jax.compressors.blocks import Blocks
from efcp_jax.compressors.top_k import SparseSpace
from efcp_jax.devices.placement import layout
from efcp_jax.passes.entries import Storage
from efcp_jax.passes.forms import Form


WINDOW = 5
STEPS = 4 * WINDOW + 3

# A vector, a scalar, a kernel that rank 2 factorises and a matrix that it does not.
SHAPES = {"bias": (7,), "gain": (), "kernel": (3, 2, 5), "weight": (2, 3)}
SIZE = 44

BF16, F8 = jnp.bfloat16, jnp.float8_e4m3fn

# What the sparse optimizers are given where rounding to bfloat16 would be seen.
WIDE = {"value_dtype": jnp.float32, "error_dtype": jnp.float32}

IDENTITY = {
    "identity": {},
    "identity-bf16": {"value_dtype": BF16},
}
TOP_K = {
    "top_k": {"density": 0.1},
    "top_k-blocks": {"density": 0.25, "block_size": 16},
    "top_k-blocks-bf16": {"density": 0.25, "block_size": 16, "value_dtype": BF16},
    "top_k-blocks-int8": {"density": 0.25, "block_size": 16, "value_dtype": jnp.int8},
    "top_k-blocks-f8": {"density": 0.25, "block_size": 4, "value_dtype": F8},
    "top_k-words-bf16": {"density": 0.25, "block_size": 16, "value_dtype": BF16},
    "top_k-all": {"density": 1.0},
}
LOW_RANK = {
    "low_rank": {"rank": 2},
    "low_rank-bf16": {"rank": 2, "value_dtype": BF16},
    "low_rank-per-leaf": {"rank": 2, "block_diagonal": True},
    "low_rank-all": {"rank": 100},
}


@dataclasses.dataclass(frozen=True)
class Words(TopK):
    """Sparse rows of words, as blocks have them that are larger than these models."""

    def bind(self, layout):
        storage = Storage(jnp.dtype(BF16), jnp.dtype(jnp.uint16))
        assert storage.words
        blocks = Blocks.of(layout, self.block_size)
        kept = max(1, round(self.density * blocks.size))
        return SparseSpace(**vars(blocks), passes=Form(blocks.size, kept, storage))


def sparse(name: str, given: dict[str, Any]) -> TopK:
    return Words(**given) if "words" in name else efcp_jax.top_k(**given)


def thin(block_diagonal: bool = False, **given: Any) -> Any:
    return scoped(efcp_jax.low_rank(**given), block_diagonal)


COMPRESSORS = {
    **{name: efcp_jax.identity(**given) for name, given in IDENTITY.items()},
    **{name: sparse(name, given) for name, given in TOP_K.items()},
    **{name: thin(**given) for name, given in LOW_RANK.items()},
}
MIXED = efcp_jax.by_label(
    {"a": efcp_jax.identity(), "b": efcp_jax.low_rank(2), "c": efcp_jax.top_k(0.34)},
    {"bias": "a", "gain": "a", "kernel": "b", "weight": "c"},
)
# One of each representation, for what does not depend on their options.
REPRESENTATIONS = ("identity", "top_k", "top_k-blocks", "low_rank", "low_rank-per-leaf")

METHODS = {
    "mfac": {"damping": 0.1},
    "ggt": {"eps": 0.01, "b1": 0.0, "b2": 1.0},
    "ggt-b1-b2": {"eps": 0.01, "b1": 0.6, "b2": 0.8},
}


def transform(method: str, **given: Any) -> Any:
    """Return `scale_by_mfac` or `scale_by_ggt` with the hyperparameters `given`."""
    mfac = method == "mfac"
    return (efcp_jax.scale_by_mfac if mfac else efcp_jax.scale_by_ggt)(**given)


def oracle(method: str, rows: list, size: int = WINDOW, **given: Any) -> np.ndarray:
    """Return the textbook's update for the last `size` of `rows`."""
    if method == "mfac":
        return oracles.mfac(rows[-size:], divisor=size, **given)
    return oracles.ggt(rows[-size:], **given)


def params(dtype: Any = jnp.float32) -> dict:
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def gradients(steps: int, dtype: Any = jnp.float32, seed: int = 0) -> dict:
    """Return `steps` gradients, stacked."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=(steps, *shape)), dtype)
        for name, shape in SHAPES.items()
    }


def at(tree: Any, step: int) -> Any:
    """Return entry `step` of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[step], tree)


def vectors(stacked: Any, dtype: Any = np.float64) -> list[np.ndarray]:
    """Return a stacked tree as a list of flat vectors."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(stacked)]
    steps = range(len(leaves[0]))
    return [oracles.flat([leaf[t] for leaf in leaves], dtype) for t in steps]


@functools.partial(jax.jit, static_argnums=0)
def run(tx: Any, stacked: Any, model: Any) -> tuple[Any, Any]:
    """Return the stacked updates and states of a run over `stacked` gradients."""
    return scan(tx, stacked, model)


def scan(tx: Any, stacked: Any, model: Any) -> tuple[Any, Any]:
    def step(state, gradient):
        update, state = tx.update(gradient, state, model)
        return state, (update, state)

    return lax.scan(step, tx.init(model), stacked)[1]


class Run(NamedTuple):
    """One run, and the rows it compressed.

    Attributes:
        updates: Flat updates, one a step.
        rows: Flat compressed gradients, one a step: by the oracle where it decides
            alike, from the factors that the window stores for low rank.
        gradients: Flat gradients, one a step.
        states: Stacked states, NumPy arrays.
    """

    updates: list[np.ndarray]
    rows: list[np.ndarray]
    gradients: list[np.ndarray]
    states: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_method(kind: str, name: str, hyperparameters, stacked, model):
    # The hyperparameters are traced, so that two sets of them share one compilation.
    compressor = COMPRESSORS[name]
    tx = transform(kind, window_size=WINDOW, compressor=compressor, **hyperparameters)
    return scan(tx, stacked, model)


@functools.cache
def compressed_run(method: str, name: str, dtype: Any = jnp.float32) -> Run:
    """Run a method with the compressor called `name`, next to the oracle's rows."""
    stacked = gradients(STEPS, dtype)
    results = _run_method(
        method.split("-")[0], name, METHODS[method], stacked, params(dtype)
    )
    updates, states = jax.device_get(results)
    if name in LOW_RANK:
        space = COMPRESSORS[name].bind(layout(params(dtype), dtype, None))
        rows = [oracles.flat(low_rank_row(space, at(states, t))) for t in range(STEPS)]
    else:
        compress = oracle_compressor(name)
        rows, _ = oracles.with_feedback(compress, vectors(stacked, dtype))
    return Run(vectors(updates), rows, vectors(stacked, dtype), states)


def bound(name: str) -> Any:
    """Return the space of the compressor called `name`, for the shared model."""
    return COMPRESSORS[name].bind(layout(params(), jnp.float32, None))


def stored_row(space: Any, rows: Any, slot: int) -> Any:
    """Return the row at `slot` of a window."""

    def part(leaf, like):
        size = like.shape[ROW_AXIS]
        return lax.slice_in_dim(leaf, slot * size, (slot + 1) * size, axis=ROW_AXIS)

    return jax.tree.map(part, rows, space.zeros()[1])


def members(space: Any, rows: Any) -> Any:
    """Yield the leaves of each member of all parts, its space, rows and ratios."""
    count = sum(len(part.members) for part in space.parts)
    ratios = iter(np.asarray(rows.ratios, np.float64).reshape(count, -1))
    for part in space.parts:
        own = [rows.parts[part.name]]
        if (count := len(part.members)) > 1:
            divided = jax.tree.map(
                lambda x, n=count: x.reshape(n, -1, *x.shape[1:]), *own
            )
            own = [at(divided, i) for i in range(count)]
        for leaves, each in zip(part.members, own, strict=True):
            yield leaves, part.space, each, next(ratios)


def dense_rows(space: Any, rows: Any, size: int) -> list[np.ndarray]:
    """Return what the `size` rows stand for, `(size, rows, cols)` for each leaf."""
    found: dict[int, np.ndarray] = {}
    if hasattr(space, "parts"):
        for leaves, inner, own, ratios in members(space, rows):
            each = [ratios[:, None, None] * x for x in dense_rows(inner, own, size)]
            found |= zip(leaves, each, strict=True)
    elif hasattr(rows, "left"):
        for leaf in range(len(rows.left)):
            both = (np.float64(side[leaf]) for side in rows)
            left, right = (x.reshape(size, -1, x.shape[1]) for x in both)
            found[leaf] = left.swapaxes(1, 2) @ right
    else:
        flat = np.float64(np.moveaxis(np.asarray(rows), 1, 0).reshape(size, -1))
        ends = np.cumsum([leaf.size for leaf in space.layout.leaves])
        pairs = zip(space.layout.leaves, np.split(flat, ends, axis=1), strict=False)
        each = [x.reshape(size, *leaf.matrix_shape) for leaf, x in pairs]
        found = dict(enumerate(each))
    return [found[index] for index in range(len(found))]


def low_rank_row(space: Any, state: Any) -> list[np.ndarray]:
    """Return the newest low-rank row as matrices, multiplied out in float64."""
    rows, scale, slot, _ = state.window
    newest = (int(slot) - 1) % len(scale)
    factor = float(scale[newest])
    return [factor * each[newest] for each in dense_rows(space, rows, len(scale))]


def products_by_leaf(name: str, products: Any) -> list[Any]:
    """Return what there is for each Gram matrix, in the order of `parts`."""
    if not LOW_RANK.get(name, {}).get("block_diagonal"):
        return jax.tree.leaves(products)
    found: dict[int, Any] = {}
    for part in bound(name).parts:
        leaves = [index for member in part.members for index in member]
        found |= zip(leaves, products[part.name], strict=True)
    return [found[index] for index in range(len(found))]


def oracle_compressor(name: str) -> Any:
    """Return the oracle of the compressor called `name`, a function of a vector."""
    if name in IDENTITY:
        return lambda vector: oracles.rounded(vector, IDENTITY[name].get("value_dtype"))
    lanes = 1 if "words" in name else None
    return lambda vector: oracles.top_k(vector, **TOP_K[name], lanes=lanes)


def parts(name: str) -> list[slice]:
    """Return the parts of the flat vector that have a Gram matrix of their own."""
    if not LOW_RANK.get(name, {}).get("block_diagonal"):
        return [slice(0, SIZE)]
    ends = np.cumsum([int(np.prod(SHAPES[key])) for key in sorted(SHAPES)]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

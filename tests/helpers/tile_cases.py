"""Vectors and windows of small blocks, and what passes over them must return."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efcp_jax.passes import tpu_tiles
from efcp_jax.passes.entries import ScaledRow, SparseRow, Storage
from efcp_jax.passes.forms import Form


class Case(NamedTuple):
    """Sizes of a window.

    Attributes:
        tiles: Number of tiles.
        lanes: Blocks of a tile.
        size: Entries a block.
        kept: Entries kept of each block.
        rows: Rows of the window.
    """

    tiles: int
    lanes: int
    size: int
    kept: int
    rows: int


LARGEST = np.finfo(np.float32).max


def interpret_kernels(monkeypatch):
    """Run the kernels for TPUs on the CPU; return the names of those used."""
    used, launch = set(), functools.partial(tpu_tiles.launch, interpret=True)

    def call(kernel, *operands, **given):
        used.add(kernel.__name__)
        return launch(kernel, *operands, **given)

    monkeypatch.setattr(tpu_tiles, "launch", call)
    return used


def form(case, dtype="float32"):
    """Return the form of blocks whose entries are stored in `dtype`."""
    storage = Storage.of(jnp.dtype(dtype), case.size)
    return Form(case.size, case.kept, storage, case.lanes)


def each_block(case, values):
    """Return what there is for each block, in order, as a vector is multiplied."""
    return np.asarray(values).reshape(case.tiles, 1, case.lanes)


def vector(case, seed=0):
    """Return `(tiles, size, lanes)`, some blocks with ties, some all zeros."""
    rng = np.random.default_rng(seed)
    total = rng.normal(size=(case.tiles, case.size, case.lanes)).astype(np.float32)
    number = each_block(case, np.arange(case.tiles * case.lanes))
    total = np.where(number % 3 == 0, np.round(total), total)
    return np.where(number % 7 == 1, np.float32(0), total)


def with_extremes(total):
    """Return `total` with infinities, largest numbers and NaNs among its entries."""
    total, size = total.copy(), total.shape[1]
    total[:, 3 % size] = np.inf
    total[:, size // 2] = -np.finfo(np.float32).max
    total[:, size - 1, ::2] = np.nan
    return total


def largest(total, kept):
    """Return offsets along axis 1, ascending: NaN first, and of equals the first."""
    number = np.where(np.isnan(total), 0, np.abs(total))
    order = np.lexsort((-number, ~np.isnan(total)), axis=1)
    return np.sort(order[:, :kept], axis=1)


def fed(error, gradient, kept, dtype):
    """Return values, offsets and the error that one pass must leave, in NumPy."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = error.astype(np.float32) + gradient
        total = np.clip(total, -LARGEST, LARGEST)
        offsets = largest(total, kept)
        taken = np.take_along_axis(total, offsets, 1)
        limit = min(float(jnp.finfo(dtype).max), LARGEST)
        taken = np.clip(taken, -limit, limit).astype(dtype).astype(np.float32)
        rest = total.copy()
        before = np.take_along_axis(total, offsets, 1)
        np.put_along_axis(rest, offsets, before - taken, 1)
        limit = min(float(jnp.finfo(error.dtype).max), LARGEST)
        return taken, offsets, np.clip(rest, -limit, limit).astype(error.dtype)


def window(case, dtype, seed=0):
    """Return a window as stored, and as a dense float64 `(m, tiles, size, lanes)`."""
    tiles, lanes, size, kept, rows = case
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(tiles, rows * kept, lanes)) * 2.0 ** rng.integers(-12, 4)
    # Rows that are not there yet: all entries are zeros at place 0.
    values[:, : (rows // 3) * kept] = 0
    order = rng.permuted(
        np.broadcast_to(np.arange(size), (tiles, rows, lanes, size)), axis=3
    )
    offsets = np.sort(order[..., :kept], axis=3).transpose(0, 1, 3, 2)
    offsets = offsets.reshape(values.shape)
    offsets[:, : (rows // 3) * kept] = 0
    offsets = jnp.asarray(offsets, jnp.uint8)
    if jnp.dtype(dtype).itemsize > 1:
        stored = SparseRow(jnp.asarray(values, dtype), offsets)
    else:  # numbers from -127 to 127, and scales of every magnitude
        values = np.clip(values * (100 / np.abs(values).max()), -127, 127)
        whole = np.rint(values) if dtype == "int8" else values
        scales = jnp.exp2(jnp.asarray(rng.integers(-12, 4, (tiles, rows))))
        scales = scales.astype(jnp.bfloat16)
        stored = ScaledRow(jnp.asarray(whole, dtype), offsets, scales)
    return stored, dense(stored, case)


def newest(case, dtype, seed=1):
    """Return a row with values in float32, and as a dense float64 vector."""
    if jnp.dtype(dtype).itemsize == 1:
        dtype = "bfloat16"
    stored, matrix = window(case._replace(rows=1), dtype, seed)
    row = SparseRow(stored.values.astype(jnp.float32), stored.offsets.astype(jnp.int32))
    return row, matrix[0]


def dense(stored, case):
    """Return the rows of a window, `(m, tiles, size, lanes)`, float64."""
    values = np.asarray(stored.values).astype(np.float64)
    if isinstance(stored, ScaledRow):
        scales = np.asarray(stored.scales).astype(np.float64)
        values *= np.repeat(scales, case.kept, axis=1)[:, :, None]
    offsets = np.asarray(stored.offsets).astype(int)
    out = np.zeros((case.rows, case.tiles, case.size, case.lanes))
    tile, entry, lane = np.indices(values.shape)
    np.add.at(out, (entry // case.kept, tile, offsets, lane), values)
    return out


def assert_sums(got, matrix, weights, axes=1):
    """Assert that `got` are sums over `matrix` times `weights`, next to its entries."""
    wanted = np.tensordot(matrix, weights, axes)
    scale = np.tensordot(np.abs(matrix), np.abs(weights), axes)
    assert got.shape == wanted.shape
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got, np.float64) - wanted)
    np.testing.assert_array_less(error, 1e-5 * scale + 1e-30)


def assert_members(function, *stacked):
    """Assert that `vmap` returns what the members return, bit by bit."""
    many = jax.jit(jax.vmap(function))(*stacked)
    one = jax.jit(function)
    count = len(jax.tree.leaves(stacked)[0])
    each = [one(*jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(count)]
    single = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    jax.tree.map(np.testing.assert_array_equal, many, single)

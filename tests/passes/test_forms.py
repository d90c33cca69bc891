"""Every platform's form of the passes against the plain one, all on the CPU.

Kernels are interpreted. What is chosen and stored must be equal; sums may differ in
their rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tile_cases
from tile_cases import Case

from efcp_jax.passes import cpu, gpu, reference, tpu
from efcp_jax.passes.entries import SparseRow, Storage
from efcp_jax.passes.forms import Form


FORMS = {"cpu": cpu, "gpu": gpu, "tpu": tpu}

# Few entries a block and many, tiles of 128 blocks and of fewer, all entries kept.
CASES = [
    Case(1, 128, 128, 1, 1),
    Case(3, 128, 128, 2, 17),
    Case(2, 128, 256, 9, 7),
    Case(2, 128, 100, 5, 7),
    Case(1, 32, 128, 41, 3),
    Case(1, 27, 256, 12, 9),
    Case(2, 5, 8, 8, 4),
    Case(1, 1, 7, 3, 4),
]
WIDE = ["bfloat16", "float16", "float32"]
DTYPES = [*WIDE, "int8", "float8_e4m3fn"]

# Blocks, entries a block, entries kept, rows.
LARGE = [(1, 4096, 41, 5), (5, 257, 3, 7), (3, 1000, 1000, 2), (37, 300, 6, 33)]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    tile_cases.interpret_kernels(monkeypatch)
    return FORMS[request.param]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def runs(total, count):
    """Cut `total` entries less a few into leaves of every length, in `count` runs."""
    total -= min(total // 2, 3)
    cuts = np.linspace(0, total, 2 * count + 1).astype(int)[1:-1]
    sizes = np.diff([0, *cuts.tolist(), total])
    pairs = [tuple(int(n) for n in pair if n) for pair in np.array_split(sizes, count)]
    return tuple(pair for pair in pairs if pair)


def close(got, wanted, scale):
    """Assert equality next to `scale`, what the sums are sums of."""
    assert got.dtype == wanted.dtype
    error = np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64))
    np.testing.assert_array_less(error, 1e-5 * np.asarray(scale, np.float64) + 1e-30)


@pytest.mark.parametrize("kind", ["random", "extremes", "zeros"])
def test_select(form, case, kind):
    total = tile_cases.vector(case)
    if kind == "zeros":
        total = -np.zeros_like(total)
    elif kind == "extremes":
        total = tile_cases.with_extremes(total)
    blocks = tile_cases.form(case)
    values, offsets = jax.jit(functools.partial(form.select, blocks))(total)
    wanted, places = reference.select(blocks, jnp.asarray(total))
    order = tile_cases.largest(total, case.kept)
    np.testing.assert_array_equal(places, order)
    np.testing.assert_array_equal(offsets, places)
    assert values.dtype == jnp.float32
    bits = lambda x: np.asarray(x).view(np.int32)
    np.testing.assert_array_equal(bits(values), bits(wanted))


def test_residual(form, case):
    total = jnp.asarray(tile_cases.vector(case))
    row, matrix = tile_cases.newest(case, "bfloat16")
    blocks = tile_cases.form(case)
    rest = jax.jit(functools.partial(form.residual, blocks))(total, *row)
    np.testing.assert_array_equal(rest, total - matrix.astype(np.float32))
    np.testing.assert_array_equal(rest, reference.residual(blocks, total, *row))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inner(form, case, dtype):
    stored, matrix = tile_cases.window(case, dtype)
    row, vector = tile_cases.newest(case, dtype)
    row = row._replace(offsets=row.offsets.astype(stored.offsets.dtype))
    blocks = tile_cases.form(case, dtype)
    got = jax.jit(functools.partial(form.inner, blocks))(stored, row)
    tile_cases.assert_sums(got, matrix, vector, axes=3)
    scale = np.tensordot(np.abs(matrix), np.abs(vector), 3)
    close(got, reference.inner(blocks, stored, row), scale)


@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        ("bfloat16", 0),
        ("float16", 3),
        ("float32", 1),
        ("int8", 2),
        ("float8_e4m3fn", 0),
    ],
)
def test_combine(form, case, dtype, count):
    stored, matrix = tile_cases.window(case, dtype)
    rng = np.random.default_rng(3)
    weights = jnp.asarray(rng.normal(size=case.rows), jnp.float32)
    total = case.tiles * case.lanes * case.size
    given = {"runs": runs(total, count) if count else ((total,),)}
    blocks = tile_cases.form(case, dtype)
    got = jax.jit(functools.partial(form.combine, blocks, **given))(stored, weights)
    wanted = reference.combine(blocks, stored, weights, **given)
    scale = np.tensordot(np.abs(weights), np.abs(matrix), 1).reshape(-1)
    start = 0
    for leaf, expected in zip(got, wanted, strict=True):
        close(leaf, expected, scale[start : start + len(expected)])
        start += len(expected)
    assert [len(leaf) for leaf in got] == [n for run in given["runs"] for n in run]


def large(shape, dtype, seed=0):
    """Return the form of large blocks, a window as it is stored, and a row."""
    count, size, kept, rows = shape
    storage = Storage.of(jnp.dtype(dtype), size)
    rng = np.random.default_rng(seed)

    def entries(rows):
        order = rng.permuted(
            np.broadcast_to(np.arange(size), (count, rows, size)), axis=2
        )
        offsets = np.sort(order[..., :kept], axis=2).reshape(count, -1)
        return rng.normal(size=offsets.shape), offsets

    window = storage.store(*map(jnp.asarray, entries(rows)))
    values, offsets = map(jnp.asarray, entries(1))
    row = SparseRow(values.astype(jnp.float32), offsets.astype(jnp.uint32))
    return Form(size, kept, storage), window, row


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", WIDE)
def test_large_blocks(form, shape, dtype):
    count, size, _, rows = shape
    blocks, window, row = large(shape, dtype)
    got = jax.jit(functools.partial(form.inner, blocks))(window, row)
    magnitude = lambda row: row._replace(values=jnp.abs(row.values))
    values, offsets = blocks.storage.load(window, jnp.float32)
    positive = blocks.storage.store(jnp.abs(values), offsets)
    scale = reference.inner(blocks, positive, magnitude(row))
    close(got, reference.inner(blocks, window, row), scale)
    dense = jnp.zeros((count, size)).at[jnp.arange(count)[:, None], row.offsets]
    got = jax.jit(functools.partial(form.dot, blocks))(window, dense.set(row.values))
    close(got, reference.inner(blocks, window, row), scale)
    weights = jax.random.normal(jax.random.key(1), (rows,))
    for leaves in (((count * size,),), runs(count * size, 2)):
        given = {"runs": leaves}
        got = jax.jit(functools.partial(form.combine, blocks, **given))(window, weights)
        wanted = reference.combine(blocks, window, weights, **given)
        scale = reference.combine(blocks, positive, jnp.abs(weights), **given)
        jax.tree.map(close, got, wanted, scale)


@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=str)
def test_members_of_a_batch_are_as_if_alone(form, case):
    make = lambda function: jax.tree.map(
        lambda *each: jnp.stack(each), *(function(seed) for seed in range(2))
    )
    vectors = make(lambda seed: jnp.asarray(tile_cases.vector(case, seed)))
    windows = make(lambda seed: tile_cases.window(case, "bfloat16", seed)[0])
    rows = make(lambda seed: tile_cases.newest(case, "float32", seed)[0])
    weights = jax.random.normal(jax.random.key(0), (2, case.rows))
    blocks = tile_cases.form(case, "bfloat16")
    tile_cases.assert_members(functools.partial(form.select, blocks), vectors)
    residual = functools.partial(form.residual, blocks)
    tile_cases.assert_members(residual, vectors, *rows)
    rows = rows._replace(offsets=rows.offsets.astype(windows.offsets.dtype))
    total = case.tiles * case.lanes * case.size
    inner = functools.partial(form.inner, blocks)
    combine = functools.partial(form.combine, blocks, runs=((total,),))
    for function, given in ((inner, (windows, rows)), (combine, (windows, weights))):
        together = jax.tree.leaves(jax.jit(jax.vmap(function))(*given))[0]
        for i in range(2):
            member = jax.tree.map(lambda leaf, i=i: leaf[i], given)
            alone = jax.tree.leaves(function(*member))[0]
            np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-6)

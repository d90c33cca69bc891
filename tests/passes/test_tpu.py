"""The kernels for TPUs against NumPy in float64; on the CPU they are interpreted."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import oracles
import pytest
import tile_cases
from tile_cases import Case

from efcp_jax import quantized
from efcp_jax.passes import tpu, tpu_feed
from efcp_jax.passes.entries import ScaledRow


# Programs with tiles to spare, rows that fill no step, several parts of a window, all
# entries kept, and blocks that are no multiple of a register.
CASES = [
    Case(1, 128, 128, 1, 1),
    Case(2, 128, 128, 2, 16),
    Case(17, 128, 128, 1, 33),
    Case(3, 128, 256, 4, 9),
    Case(2, 128, 256, 1, 70),
    Case(1, 128, 128, 3, 350),
    Case(1, 128, 128, 41, 3),
    Case(3, 128, 64, 2, 24),
    Case(2, 128, 100, 5, 7),
    Case(2, 128, 200, 9, 11),
    Case(4, 128, 1, 1, 8),
    Case(2, 128, 8, 8, 5),
]
BATCHED = [CASES[1], CASES[8]]
DTYPES = ["bfloat16", "float32", "int8", "float8_e4m3fn"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    tile_cases.interpret_kernels(monkeypatch)


@functools.cache
def compiled(function, form, **static):
    return jax.jit(functools.partial(function, form, **static))


def whole(case):
    """Return one run of one leaf."""
    return ((case.tiles * case.lanes * case.size,),)


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


# Whether to accept a gradient, and the number of the step.
ACCEPTED = jnp.asarray(True), jnp.int32(0)


@pytest.mark.parametrize("extremes", [False, True])
def test_the_largest_entries_are_selected(case, extremes):
    total = tile_cases.vector(case)
    if extremes:
        total = tile_cases.with_extremes(total)
    feed = compiled(tpu_feed.feed, tile_cases.form(case))
    step = jnp.asarray(False), jnp.int32(0)
    values, offsets, _ = feed(total, jnp.zeros_like(total), *step)
    wanted = tile_cases.largest(total, case.kept)
    np.testing.assert_array_equal(offsets, wanted)
    # What overflows becomes the largest number.
    numbers = np.clip(total, -tile_cases.LARGEST, tile_cases.LARGEST)
    numbers = np.take_along_axis(numbers, wanted, 1)
    np.testing.assert_array_equal(values, numbers)


@pytest.mark.parametrize(
    ("error_dtype", "dtype"),
    [("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")],
)
def test_feed_is_addition_selection_and_what_is_left(case, error_dtype, dtype):
    error = np.asarray(tile_cases.vector(case, 1)).astype(jnp.dtype(error_dtype))
    gradient = tile_cases.vector(case, 2)
    # What overflows becomes the largest number.
    gradient[::5, 0] = tile_cases.LARGEST
    error[::5, 0] = 0.75 * float(jnp.finfo(error.dtype).max)
    feed = compiled(tpu_feed.feed, tile_cases.form(case, dtype))
    values, offsets, rest = feed(error, jnp.asarray(gradient), *ACCEPTED)
    wanted, places, left = tile_cases.fed(error, gradient, case.kept, jnp.dtype(dtype))
    np.testing.assert_array_equal(offsets, places)
    np.testing.assert_array_equal(values, wanted)
    assert rest.dtype == error_dtype
    np.testing.assert_array_equal(rest, left)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_feed_rounds_every_tile_by_itself(case, dtype):
    error, gradient = tile_cases.vector(case, 1), tile_cases.vector(case, 2)
    # Tiles of every magnitude.
    each = 10.0 ** np.linspace(30, -32, case.tiles).astype(np.float32)
    error, gradient = (x * each[:, None, None] for x in (error, gradient))
    form = tile_cases.form(case, dtype)
    feed = compiled(tpu_feed.feed, form)
    given = jnp.asarray(error), jnp.asarray(gradient), *ACCEPTED
    values, offsets, rest = feed(*given)
    total = error + gradient
    places = tile_cases.largest(total, case.kept)
    np.testing.assert_array_equal(offsets, places)
    row = np.zeros_like(total)
    np.put_along_axis(row, places, np.take_along_axis(total, places, 1), 1)
    row = oracles.quantised(row.reshape(-1), case.size, jnp.dtype(dtype))
    row = row.reshape(total.shape)
    np.testing.assert_array_equal(values, np.take_along_axis(row, places, 1))
    np.testing.assert_array_equal(rest, total - row)
    # What is stored is what was rounded.
    stored = form.storage.store(values, offsets)
    assert isinstance(stored, ScaledRow)
    np.testing.assert_array_equal(form.storage.load(stored, jnp.float32)[0], values)


def test_feed_keeps_an_error_in_bytes_as_it_is_kept_elsewhere(case):
    kept_in, count = jnp.dtype(jnp.int8), jnp.int32(11)
    spread = 10.0 ** np.linspace(-20, 20, case.tiles * case.size)
    spread = spread.reshape(case.tiles, case.size, 1)
    start = jnp.asarray(spread * tile_cases.vector(case, 1), jnp.float32)
    nothing = quantized.zeros(start, P(), kept_in)
    old = quantized.store(start, nothing, ACCEPTED[0], jnp.int32(4))
    gradient = jnp.asarray(spread * tile_cases.vector(case, 2), jnp.float32)
    feed = compiled(tpu_feed.feed, tile_cases.form(case, "bfloat16"))
    values, offsets, rest = feed(old, gradient, jnp.asarray(True), count)
    # The same numbers from an error of float32, rounded behind the pass.
    vector = quantized.load(old)
    *row, left = feed(vector, gradient, jnp.asarray(True), count)
    np.testing.assert_array_equal(values, row[0])
    np.testing.assert_array_equal(offsets, row[1])
    expected = quantized.store(left, old, jnp.asarray(True), count)
    jax.tree.map(np.testing.assert_array_equal, rest, expected)
    _, _, rest = feed(old, jnp.full_like(gradient, jnp.nan), jnp.asarray(False), count)
    jax.tree.map(np.testing.assert_array_equal, rest, old)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_feed_leaves_the_error_alone_if_told_so(dtype):
    case = CASES[3]
    error = jnp.asarray(tile_cases.vector(case, 1), dtype)
    gradient = jnp.full(error.shape, jnp.nan)
    feed = compiled(tpu_feed.feed, tile_cases.form(case, "bfloat16"))
    _, _, rest = feed(error, gradient, jnp.asarray(False), jnp.int32(0))
    np.testing.assert_array_equal(rest, error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inner_products_are_those_of_dense_rows(case, dtype):
    stored, matrix = tile_cases.window(case, dtype)
    row, vector = tile_cases.newest(case, dtype)
    got = compiled(tpu.inner, tile_cases.form(case, dtype))(stored, row)
    tile_cases.assert_sums(got, matrix, vector, axes=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_rows_are_those_of_dense_rows(case, dtype):
    stored, matrix = tile_cases.window(case, dtype)
    weights = np.random.default_rng(3).normal(size=case.rows).astype(np.float32)
    combine = compiled(tpu.combine, tile_cases.form(case, dtype), runs=whole(case))
    (got,) = combine(stored, jnp.asarray(weights))
    matrix = matrix.reshape(case.rows, -1)
    tile_cases.assert_sums(got, matrix.T, weights)


def test_every_number_of_eight_bits_is_read_as_it_is():
    every = np.arange(1 << 8, dtype=np.uint8).reshape(2, 1, 128)
    case = Case(2, 128, 128, 1, 1)
    for dtype in ("float8_e4m3fn", "int8"):
        values = every.view(jnp.dtype(dtype))
        values = np.where(np.isnan(values), values.dtype.type(0), values)
        offsets = jnp.zeros(values.shape, jnp.uint8)
        ones = jnp.ones((2, 1), jnp.bfloat16)
        stored = ScaledRow(jnp.asarray(values), offsets, ones)
        combine = compiled(tpu.combine, tile_cases.form(case, dtype), runs=whole(case))
        (got,) = combine(stored, jnp.ones(1))
        got = got.reshape(2, case.size, 128)[:, :1]
        np.testing.assert_array_equal(got, values.astype(np.float32))


def stacked(make):
    return jax.tree.map(lambda *each: jnp.stack(each), *map(make, range(3)))


@pytest.mark.parametrize("case", BATCHED, ids=str)
def test_members_of_a_batch_are_as_if_alone(case):
    vectors = stacked(lambda seed: jnp.asarray(tile_cases.vector(case, seed)))
    windows = stacked(lambda seed: tile_cases.window(case, "bfloat16", seed)[0])
    rows = stacked(lambda seed: tile_cases.newest(case, "float32", seed)[0])
    weights = jax.random.normal(jax.random.key(0), (3, case.rows))
    form = tile_cases.form(case, "bfloat16")
    check = lambda kernel, *given, **static: tile_cases.assert_members(
        functools.partial(kernel, form, **static), *given
    )
    accept = jnp.asarray([True, False, True])
    check(tpu_feed.feed, vectors, vectors[::-1], accept, jnp.arange(3))
    check(tpu.inner, windows, rows)
    check(tpu.combine, windows, weights, runs=whole(case))

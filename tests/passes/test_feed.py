"""Feeding some blocks after others: as all at once, whatever a round is."""

import functools

import aliases
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import tile_cases
from tile_cases import Case

import efcp_jax
from efcp_jax import quantized
from efcp_jax.devices.sections import piece_of
from efcp_jax.passes import cpu, gpu
from efcp_jax.passes.entries import Storage
from efcp_jax.passes.forms import Form


# Tiles, and blocks of more than 256 entries, which are of one lane.
CASES = [
    Case(7, 128, 16, 2, 1),
    Case(5, 128, 8, 8, 1),
    Case(3, 128, 32, 5, 1),
    Case(11, 1, 300, 6, 1),
    Case(8, 1, 512, 3, 1),
]
# Rounds of one unit, and of half of them, rounded up, so that the last begins early.
ROUNDS = ["one", "half"]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(params=[cpu, gpu], ids=["cpu", "gpu"])
def module(request):
    return request.param


@pytest.fixture(params=ROUNDS)
def rounds(request, monkeypatch, case):
    units = {"one": 1, "half": -(-case.tiles // 2)}[request.param]
    monkeypatch.setattr(cpu, "_ENTRIES", units * case.lanes * case.size)
    monkeypatch.setattr(gpu, "_WHOLE", units * case.lanes * case.size)
    monkeypatch.setattr(gpu, "_LEAST", units * case.lanes * case.size)
    monkeypatch.setattr(gpu, "_PARTS", case.tiles)
    return units


def feed(module, case, error, gradient, accept=True, count=3, dtype="bfloat16", cuts=9):
    """Return values and offsets of a row, and the error."""
    storage = Storage.of(jnp.dtype(dtype), case.size)
    form = Form(case.size, case.kept, storage, case.lanes if case.size <= 256 else None)
    # Leaves of every length.
    flat = jnp.asarray(gradient).reshape(-1)
    ends = np.cumsum(2 ** np.arange(cuts) * len(flat) // 2**cuts)
    leaves = [*jnp.split(flat, ends[ends < len(flat)])]
    assert cpu.feeds(form, error, jnp.dtype("float32"))
    assert gpu.feeds(form, error) == (case.size <= 256)

    def run(error, leaves, accept, count):
        pieces = [piece_of(leaf, jnp.dtype("float32")) for leaf in leaves]
        return module.feed(form, error, pieces, accept, count)

    step = jnp.asarray(accept), jnp.int32(count)
    values, offsets, rest = jax.jit(run)(error, leaves, *step)
    return values, offsets, rest


def vector(case, seed):
    tiles = tile_cases.vector(case, seed)
    return tiles if case.size <= 256 else tiles[:, :, 0]


def vectors(case):
    error = vector(case, 1).astype(jnp.bfloat16)
    gradient = vector(case, 2)
    # What overflows becomes the largest number.
    gradient[::5, 0] = tile_cases.LARGEST
    error[::5, 0] = 0.75 * float(jnp.finfo(error.dtype).max)
    return error, gradient


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_feed_is_addition_selection_and_what_is_left(module, case, dtype):
    error, gradient = vectors(case)
    values, offsets, rest = feed(module, case, error, gradient, dtype=dtype)
    given = error, gradient, case.kept, jnp.dtype(dtype)
    wanted, places, left = tile_cases.fed(*given)
    np.testing.assert_array_equal(offsets, places)
    np.testing.assert_array_equal(values, wanted)
    assert rest.dtype == error.dtype
    np.testing.assert_array_equal(rest, left)


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_what_is_not_accepted_changes_no_bit(module, case, kind):
    error, gradient = vectors(case)
    error = stored(error, kind)
    *_, rest = feed(module, case, error, np.full_like(gradient, np.nan), accept=False)
    jax.tree.map(np.testing.assert_array_equal, rest, error)


def stored(error, kind):
    """Return an error as it is kept in `kind`."""
    vector = jnp.asarray(error, jnp.float32)
    like = quantized.zeros(vector, P(), jnp.dtype(kind))
    return quantized.store(vector, like, jnp.asarray(True), jnp.int32(1))


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_error_of_bytes_is_rounded_as_all_at_once(module, case, dtype):
    if case.size > 256:
        dtype = "bfloat16"  # values of 8 bits are for tiles
    error, gradient = vector(case, 1), vector(case, 2)
    spread = 10.0 ** np.linspace(-20, 20, error.size // error.shape[-1])
    spread = spread.reshape(*error.shape[:-1], 1)
    error = spread * error
    old, gradient = stored(error, "int8"), (spread * gradient).astype(np.float32)
    values, offsets, rest = feed(module, case, old, gradient, count=11, dtype=dtype)
    total = np.asarray(quantized.load(old)) + gradient
    np.testing.assert_array_equal(offsets, tile_cases.largest(total, case.kept))
    left = total.copy()
    taken = np.take_along_axis(total, offsets, 1) - np.asarray(values)
    np.put_along_axis(left, np.asarray(offsets), taken, 1)
    expected = quantized.store(jnp.asarray(left), old, jnp.asarray(True), jnp.int32(11))
    jax.tree.map(np.testing.assert_array_equal, rest, expected)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("block_size", [16, 300])
def test_training_in_rounds_is_training_at_once(monkeypatch, kind, block_size):
    """Leaves of all dtypes, more than blocks hold, and a step that is skipped."""
    params = {
        "a": jnp.zeros((70, 90)),
        "b": jnp.zeros(11, jnp.bfloat16),
        "c": jnp.zeros((3, 5), jnp.complex64),
        "d": jnp.zeros(()),
        "e": jnp.zeros((41, 60), jnp.bfloat16),
        "f": jnp.zeros(0),
    }
    compressor = efcp_jax.top_k(0.1, block_size=block_size, value_dtype="bfloat16")
    tx = efcp_jax.scale_by_mfac(4, compressor=compressor, error_dtype=kind)

    def train():
        # A function of its own, so that it is traced again.
        state, step = tx.init(params), jax.jit(functools.partial(tx.update))
        for i in range(6):
            keys = jax.random.split(jax.random.key(i), len(params))
            draw = lambda key, x: jax.random.normal(key, x.shape, x.dtype)
            gradient = dict(zip(params, map(draw, keys, params.values()), strict=True))
            if i == 3:
                gradient["a"] = gradient["a"].at[2, 3].set(jnp.inf)
            updates, state = step(gradient, state)
        return updates, state

    at_once = train()
    monkeypatch.setattr(cpu, "_ENTRIES", 700)
    in_rounds = train()
    aliases.assert_equal(in_rounds, at_once)

"""Entries of sparse rows come back as they were stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efcp_jax
from efcp_jax.devices.placement import layout
from efcp_jax.passes.entries import SparseRow, Storage


BF16, F16 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)


def numbers(dtype):
    """Return every number of `dtype`, which is of half precision."""
    every = np.arange(2**16, dtype=np.uint16)
    exponent = 0x7F80 if dtype == BF16 else 0x7C00
    return every[every & exponent != exponent].view(dtype)


@pytest.mark.parametrize("dtype", [BF16, F16, np.dtype(np.float32)])
@pytest.mark.parametrize("block_size", [256, 257, 65_536, 65_537])
def test_every_value_and_offset_comes_back(dtype, block_size):
    storage = Storage.of(dtype, block_size)
    assert storage.words == (dtype.itemsize == 2 and 256 < block_size <= 65_536)
    values = numbers(dtype if dtype.itemsize == 2 else F16).astype(np.float32)
    if dtype == BF16:
        # XLA takes numbers below the smallest normal one for zeros.
        values[np.abs(values) < np.finfo(np.float32).tiny] = 0
    offsets = np.arange(len(values)) % block_size
    offsets[0] = block_size - 1
    stored = jax.jit(storage.store)(values, offsets)
    assert jax.tree.structure(stored) == jax.tree.structure(storage.zeros((1,)))
    sizes = {4} if storage.words else {dtype.itemsize, storage.offsets.itemsize}
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(stored)} == sizes
    loaded, places = jax.jit(lambda s: storage.load(s, jnp.float32))(stored)
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(loaded, values)
    np.testing.assert_array_equal(places, offsets)


def test_values_are_rounded_to_nearest():
    storage = Storage.of(BF16, 4096)
    values = jnp.asarray([1.0 + 2**-9, 1.0 + 3 * 2**-8, -1e-3, 3e38])
    loaded, _ = storage.load(storage.store(values, jnp.arange(4)), jnp.float32)
    rounded = np.asarray(values).astype(BF16).astype(np.float32)
    np.testing.assert_array_equal(loaded, rounded)


def test_doubles_from_words():
    with jax.enable_x64(True):
        storage = Storage.of(F16, 4096)
        stored = storage.store(jnp.asarray([0.1, -7.0]), jnp.asarray([5, 4095]))
        loaded, offsets = storage.load(stored, jnp.float64)
        assert loaded.dtype == jnp.float64
        np.testing.assert_array_equal(loaded, np.float16([0.1, -7]).astype(float))
        np.testing.assert_array_equal(offsets, [5, 4095])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_steps_with_words_are_those_with_two_arrays(dtype, monkeypatch):
    params = {"w": jnp.zeros((40, 30)), "b": jnp.zeros(70)}
    rng = np.random.default_rng(0)
    stacked = jax.tree.map(
        lambda p: rng.standard_normal((12, *p.shape)).astype(np.float32), params
    )

    def run():
        compressor = efcp_jax.top_k(0.05, block_size=500, value_dtype=dtype)
        tx = efcp_jax.scale_by_mfac(5, compressor=compressor)

        def one(state, gradient):
            update, state = tx.update(gradient, state, params)
            return state, update

        return jax.jit(lambda s, g: jax.lax.scan(one, s, g))(tx.init(params), stacked)

    state, updates = run()
    assert state.window.rows.dtype == jnp.uint32
    monkeypatch.setattr(Storage, "words", False)
    plain, expected = run()
    assert isinstance(plain.window.rows, SparseRow)
    for a, b in zip(
        jax.tree.leaves((state.error, updates)),
        jax.tree.leaves((plain.error, expected)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_memory_is_four_bytes_an_entry():
    params = jnp.zeros(10_000)
    space = efcp_jax.top_k(0.01, block_size=1000, value_dtype=BF16).bind(
        layout(params, jnp.float32, None)
    )
    row = space.zeros()[1]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(row)) == 4 * 100

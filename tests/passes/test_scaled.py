"""Values of 8 bits: rounded as written out in NumPy, for tiles of every magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tile_cases

import efcp_jax
from efcp_jax.devices.placement import layout
from efcp_jax.passes.entries import DTYPES, Storage, quantise


TILES, KEPT, LANES = 9, 2, 128

every_dtype = pytest.mark.parametrize("dtype", [jnp.dtype(name) for name in DTYPES])


def rows(seed=0):
    """Return entries of a row, tiles of them some magnitudes apart, one of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(TILES, KEPT, LANES))
    # Entries of a tile differ in magnitude as well.
    values *= 2.0 ** rng.integers(-20, 0, (TILES, KEPT, LANES))
    values *= np.float64(10) ** np.arange(-28, 35, 7)[:, None, None]
    values[4] = 0
    return values.astype(np.float32)


def loaded(stored):
    scales = np.asarray(stored.scales).astype(np.float32)
    return np.asarray(stored.values).astype(np.float32) * scales[:, :, None]


def store(values, dtype):
    storage = Storage.of(dtype, 128)
    assert storage.scaled
    offsets = jnp.zeros(values.shape, jnp.int32)
    return jax.jit(storage.store)(jnp.asarray(values), offsets)


@every_dtype
def test_every_tile_is_rounded_to_its_own_power_of_two(dtype):
    values = rows()
    stored = store(values, dtype)
    expected = [
        oracles.quantised(tile.reshape(-1), KEPT, dtype).reshape(tile.shape)
        for tile in values
    ]
    np.testing.assert_array_equal(loaded(stored), expected)
    mantissas = np.frexp(np.asarray(stored.scales).astype(np.float64))[0]
    assert set(mantissas.ravel().tolist()) == {0.0, 0.5}
    assert np.isfinite(loaded(stored)).all()
    got, _ = Storage.of(dtype, 128).load(stored, jnp.float32)
    np.testing.assert_array_equal(got, expected)


@every_dtype
def test_errors_of_rounding_are_as_documented(dtype):
    values = rows(1)
    peak = np.abs(values).max(axis=(1, 2), keepdims=True)
    error = np.abs(loaded(store(values, dtype)).astype(np.float64) - values)
    if dtype == jnp.int8:
        # Half a step, and a whole one for what lies above the largest number.
        steps = np.where(np.abs(values) < 0.99 * peak, 1 / 2, 1)
        assert (error <= steps / 64 * peak).all()
    else:
        assert (error <= np.maximum(np.abs(values) / 16, peak * 2.0**-17)).all()
    assert error.max() > 0


@every_dtype
def test_storing_what_was_stored_changes_nothing(dtype):
    once = store(rows(2), dtype)
    twice = store(loaded(once), dtype)
    for before, after in zip(once, twice, strict=True):
        np.testing.assert_array_equal(before, after)


@every_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_tile_and_no_other(dtype, bad):
    values = rows()
    values[3, 1, 5] = bad
    got = loaded(store(values, dtype))
    assert np.isnan(got[3]).all()
    clean = loaded(store(rows(), dtype))
    np.testing.assert_array_equal(np.delete(got, 3, 0), np.delete(clean, 3, 0))


@every_dtype
def test_the_ends_of_the_range_stay_within_it(dtype):
    tiny = np.finfo(np.float32).tiny
    values = np.zeros((5, 1, LANES), np.float32)
    values[:, 0, 0] = [np.finfo(np.float32).max, tiny, 4 * tiny, 2.0**-110, 1e-45]
    got = loaded(store(values, dtype)).astype(np.float64)
    assert np.isfinite(got).all()
    assert got[0, 0, 0] > 0.9 * values[0, 0, 0]
    # Below the least scale there is nothing, and error feedback keeps it.
    assert (np.abs(got) <= np.abs(values.astype(np.float64)) * (1 + 1 / 16)).all()
    assert got[3, 0, 0] == values[3, 0, 0]


@every_dtype
def test_doubles_are_rounded_once(dtype):
    with jax.enable_x64(True):
        values = rows(3).astype(np.float64) + np.finfo(np.float64).eps
        eights, scales = quantise(jnp.asarray(values[5:]), dtype)
        got = np.asarray(eights).astype(np.float64)
        got = got * np.asarray(scales).astype(np.float64)[:, :, None]
    expected = [
        oracles.quantised(tile.reshape(-1), KEPT, dtype).reshape(tile.shape)
        for tile in values[5:]
    ]
    np.testing.assert_array_equal(got, expected)


@every_dtype
def test_a_row_takes_two_bytes_an_entry_and_two_a_tile(dtype):
    params = jnp.zeros(3 * 128 * 128)
    compressor = efcp_jax.top_k(1 / 128, block_size=128, value_dtype=dtype)
    row = compressor.bind(layout(params, jnp.float32, None)).zeros()[1]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(row)) == 2 * 3 * 128 + 2 * 3


@every_dtype
def test_rows_of_a_window_keep_their_own_scales(dtype):
    case = tile_cases.Case(2, 128, 128, 2, 3)
    stored, matrix = tile_cases.window(case, dtype)
    loaded, _ = Storage.of(dtype, 128).load(stored, jnp.float32)
    each = np.asarray(loaded, np.float64)
    total = np.sum(np.abs(matrix), axis=(1, 2, 3))
    for row in range(case.rows):
        mine = each[:, row * case.kept : (row + 1) * case.kept]
        np.testing.assert_allclose(np.abs(mine).sum(), total[row], rtol=1e-6)

"""The largest entries of each row against a stable sort, one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efcp_jax.passes.selection import argmax, by_rounds, first_largest, largest


# Rows, entries a row, entries kept: one level and two, whole words and parts of words,
# more words than are compared one by one, nearly nothing and nearly everything kept.
SIZES = [
    (1, 1, 1),
    (2, 5, 2),
    (3, 33, 32),
    (2, 100, 7),
    (3, 1000, 10),
    (2, 1001, 250),
    (2, 4096, 41),
    (1, 70_001, 700),
    (2, 300, 300),
]


def entries(kind, shape, rng):
    x = rng.standard_normal(shape)
    match kind:
        case "normal":
            return x
        case "ties":
            return np.round(x)
        case "zeros":
            return np.zeros(shape)
        case "few":
            return np.where(rng.random(shape) < 0.995, -0.0, x)
        case "tiny":  # below the smallest normal number
            return 1e-41 * x
        case "neighbours":  # that differ in the last bit
            return 1 + np.finfo(np.float32).eps * rng.integers(0, 4, shape)
        case "infinite":
            return np.where(rng.random(shape) < 0.01, -np.inf, x)
        case "falling":
            return np.broadcast_to(-np.arange(shape[1], 0, -1.0), shape)


def expected(x, kept):
    order = [np.argsort(-np.abs(row), kind="stable")[:kept] for row in x]
    return np.sort(np.stack(order), axis=1)


KINDS = [
    "normal",
    "ties",
    "zeros",
    "few",
    "tiny",
    "neighbours",
    "infinite",
    "falling",
]


@pytest.mark.parametrize(("rows", "size", "kept"), SIZES)
def test_largest_entries_are_those_of_a_stable_sort(rows, size, kept):
    rng = np.random.default_rng(size)
    select = jax.jit(largest, static_argnums=1)
    for kind in KINDS:
        x = entries(kind, (rows, size), rng).astype(np.float32)
        got = select(jnp.asarray(x), kept)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, expected(x, kept), err_msg=kind)


@pytest.mark.whole
@pytest.mark.parametrize("first", [argmax, first_largest])
@pytest.mark.parametrize("kept", [1, 2, 5, 8])
def test_rounds_of_maxima_are_a_stable_sort_as_well(kept, first):
    rng = np.random.default_rng(kept)
    select = jax.jit(lambda x, kept: by_rounds(x, kept, first), static_argnums=1)
    for kind in KINDS:
        x = entries(kind, (40, 128), rng).astype(np.float32)
        got = select(jnp.asarray(x), kept)
        np.testing.assert_array_equal(got, expected(x, kept), err_msg=kind)
        # As they lie side by side.
        got = select(jnp.asarray(x.T[None]), kept)
        np.testing.assert_array_equal(got[0].T, expected(x, kept), err_msg=kind)


@pytest.mark.parametrize(("rows", "size", "kept"), [(2, 100, 7), (2, 4096, 41)])
def test_doubles_are_told_apart_in_their_last_bit(rows, size, kept):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = 1 + np.finfo(np.float64).eps * rng.integers(0, 9, (rows, size))
        got = jax.jit(largest, static_argnums=1)(jnp.asarray(x), kept)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, expected(x, kept))


@pytest.mark.parametrize(("size", "kept"), [(100, 7), (4096, 41)])
def test_nan_comes_before_every_number(size, kept):
    x = np.random.default_rng(1).standard_normal((1, size)).astype(np.float32)
    x[0, 5], x[0, 90] = np.inf, np.nan
    got = np.asarray(jax.jit(largest, static_argnums=1)(jnp.asarray(x), kept))
    assert {5, 90} <= set(got[0])
    one = jax.jit(largest, static_argnums=1)(jnp.asarray(x), 1)
    np.testing.assert_array_equal(one, [[90]])


def test_vmap_selects_in_every_member():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 2, 1000)).astype(np.float32)
    x[1] = 0  # needs every bit, while the others are found early
    got = jax.vmap(lambda v: largest(v, 10))(jnp.asarray(x))
    for one, wanted in zip(got, x, strict=True):
        np.testing.assert_array_equal(one, expected(wanted, 10))

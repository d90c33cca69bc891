"""A function of a root by products, against NumPy's eigenvalues in float64."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from efcp_jax.numerics import dot_by_rows
from efcp_jax.preconditioners import ggt, ggt_coefficients


EPS = float(np.finfo(np.float32).eps)
by_products = jax.jit(ggt.by_products)
by_vectors = jax.jit(lambda *given: ggt.by_eigenvectors(*given)[0])


def rows(size, condition, seed=0):
    """Return rows whose Gram matrix has a condition, none longer than 1."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((size, size)))
    right, _ = np.linalg.qr(rng.standard_normal((2 * size, size)))
    made = (left * np.geomspace(1, condition**-0.5, size)) @ right.T
    return made / np.linalg.norm(made, axis=1).max()


def exact(given, eps, rhs):
    """Return what is asked for, of rows in float64."""
    values, vectors = np.linalg.eigh(given @ given.T)
    floor = np.sqrt(EPS * max(values[-1], 1))
    singular = np.maximum(np.sqrt(np.maximum(values, 0)), floor)
    return vectors @ (vectors.T @ rhs / (singular + eps))


def error(given, eps, solve):
    rhs = np.zeros(len(given), np.float32)
    rhs[len(given) // 2] = 1
    gram = (given @ given.T).astype(np.float32)
    result = np.asarray(solve(gram, np.float32(eps), rhs), np.float64)
    return oracles.relative_error(
        given.T @ result, given.T @ exact(given, np.float64(np.float32(eps)), rhs)
    )


@pytest.mark.parametrize("eps", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("size", [1, 6, 64, 300])
def test_error_is_the_condition_times_the_rounding_unit(size, condition, eps):
    given = rows(size, condition)
    # Of which an eps that hides small singular values takes its part.
    condition = min(condition, ((1 + eps) / (condition**-0.5 + eps)) ** 2)
    assert error(given, eps, by_products) <= 4 * EPS * condition**0.75 + 10 * EPS


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e7])
def test_no_less_exact_than_eigenvectors(condition):
    given = rows(64, condition)
    assert error(given, 1e-3, by_products) <= error(given, 1e-3, by_vectors)


def test_singular_values_at_the_floor_are_the_floor():
    norms = np.geomspace(1, 1e-8, 41)
    gram = np.diag(norms**2).astype(np.float32)
    result = np.asarray(by_products(gram, np.float32(0), np.ones(41, np.float32)))
    expected = 1 / np.maximum(norms, np.sqrt(EPS))
    np.testing.assert_allclose(result, expected, rtol=1e-2)
    far = np.abs(np.log(norms**2 / EPS)) > 1
    np.testing.assert_allclose(result[far], expected[far], rtol=1e-4)


def windows():
    rng = np.random.default_rng(1)
    yield np.zeros((6, 8))
    yield np.ones((6, 8)) / np.sqrt(8)
    yield np.eye(6, 8) * (np.arange(6) == 2)[:, None]
    for size, rank in ((6, 2), (64, 16), (300, 40)):
        low = rng.standard_normal((size, rank)) @ rng.standard_normal((rank, 400))
        yield low / np.linalg.norm(low, axis=1).max()


@pytest.mark.parametrize("given", list(windows()))
@pytest.mark.parametrize("eps", [0.0, 1e-3, 1.0])
def test_dependent_rows_give_the_result_of_the_floor(given, eps):
    # Rounding in the null space is divided by the floor.
    assert error(given, eps, by_products) <= 2 * np.sqrt(EPS) * len(given) ** 0.5


def test_numbers_that_are_not_finite_do_not_vanish():
    gram = np.eye(6, dtype=np.float32)
    gram[2, 3] = gram[3, 2] = np.nan
    result = by_products(gram, np.float32(1), np.ones(6, np.float32))
    assert np.all(np.isnan(result))


def test_doubles_stay_doubles_and_batches_are_one_by_one():
    with jax.enable_x64(True):
        batch = np.stack([rows(12, 1e6, seed) for seed in (0, 1)])
        grams = jnp.asarray(batch @ batch.transpose(0, 2, 1))
        rhs, eps = jnp.eye(12)[3], jnp.asarray(1e-6)
        together = jax.vmap(ggt.by_products, (0, None, None))(grams, eps, rhs)
        assert together.dtype == jnp.float64
        for given, result in zip(batch, together, strict=True):
            values, vectors = np.linalg.eigh(given @ given.T)
            wanted = vectors @ (vectors.T @ rhs / (np.sqrt(values) + 1e-6))
            assert oracles.relative_error(result, wanted) <= 1e-9


def test_tpus_take_products_for_large_windows_only(monkeypatch):
    """The coefficients of a step as a TPU computes them are those of a CPU."""
    given = rows(40, 1e2).astype(np.float32)
    gram, age = jnp.asarray(given @ given.T), jnp.arange(40)
    scale, taken = jnp.full(40, 8.0), []

    def step():
        # A function of its own each time, which is traced anew.
        make = lambda gram: ggt_coefficients(gram, scale, age, 40, 1e-2, 0.5, 0.98)
        return jax.jit(make)(gram)

    here = step()

    def choose(*operands, tpu, default):
        taken.append(default)
        return tpu(*operands)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    np.testing.assert_array_equal(step(), here)
    assert not taken
    monkeypatch.setattr(ggt, "_EIGENVECTORS", 39)
    assert oracles.relative_error(step(), here) <= 1e-4
    assert len(taken) == 1


@pytest.mark.parametrize("size", [3, 256, 257, 512, 700])
def test_products_by_rows_are_products(size):
    rng = np.random.default_rng(size)
    left, right = rng.standard_normal((2, size, size)).astype(np.float32)
    got = jax.jit(dot_by_rows)(left, right)
    np.testing.assert_allclose(got, left @ right, rtol=1e-4, atol=1e-4)

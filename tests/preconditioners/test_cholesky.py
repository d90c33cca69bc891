"""The factorisation in blocks against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efcp_jax.preconditioners import cholesky


EPS = float(np.finfo(np.float32).eps)
# One block, its edge, two, and blocks of blocks of unequal sizes.
SIZES = [1, 7, 128, 129, 300, 515]


def matrix(size, condition, rng):
    """Return a symmetric matrix with eigenvalues from 1 to 1 / condition."""
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return (basis * np.geomspace(1, 1 / condition, size)) @ basis.T


@jax.jit
def factor_and_solve(given, rhs):
    factor = cholesky.factorise(given)
    return cholesky.pivots(factor), cholesky.solve(factor, rhs)


@pytest.mark.parametrize("size", SIZES)
def test_solution_has_a_small_backward_error(size):
    rng = np.random.default_rng(size)
    for condition in (1.0, 1e2, 1e5):
        given = matrix(size, condition, rng).astype(np.float32)
        rhs = rng.standard_normal(size).astype(np.float32)
        pivots, solution = map(np.asarray, factor_and_solve(given, rhs))
        exact = given.astype(np.float64)
        exact = np.tril(exact) + np.tril(exact, -1).T
        residual = exact @ solution.astype(np.float64) - rhs
        # Higham, Accuracy and Stability, 10.4, with a norm of 1 and n for the constant.
        limit = size * EPS * np.linalg.norm(solution) + EPS * np.linalg.norm(rhs)
        assert np.linalg.norm(residual) <= limit
        wanted = np.diagonal(np.linalg.cholesky(exact))
        np.testing.assert_allclose(pivots, wanted, rtol=size * EPS * condition)


@pytest.mark.parametrize("size", [7, 300])
def test_pivots_of_an_indefinite_matrix_are_nan(size):
    for bad in (0, size // 2, size - 1):
        given = np.eye(size, dtype=np.float32)
        given[bad, bad] = -1
        pivots, _ = factor_and_solve(given, np.ones(size, np.float32))
        assert np.any(np.isnan(pivots))


def test_upper_half_is_not_read():
    given = matrix(300, 10.0, np.random.default_rng(0)).astype(np.float32)
    rhs = np.ones(300, np.float32)
    half = np.where(np.tri(300, dtype=bool), given, np.float32(7))
    for a, b in zip(
        factor_and_solve(given, rhs), factor_and_solve(half, rhs), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_batches_factorise_and_doubles_stay_doubles():
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        given = jnp.asarray(np.stack([matrix(200, 10.0, rng) for _ in range(2)]))
        _, solutions = jax.vmap(factor_and_solve)(given, jnp.ones((2, 200)))
        assert solutions.dtype == jnp.float64
        for one, solution in zip(given, solutions, strict=True):
            np.testing.assert_allclose(one @ solution, np.ones(200), atol=1e-12)


def test_one_block_of_any_size_is_the_same_factorisation():
    """What NVIDIA's and AMD's accelerators do."""
    rng = np.random.default_rng(4)
    given = matrix(300, 10.0, rng).astype(np.float32)
    rhs = rng.standard_normal(300).astype(np.float32)

    @jax.jit
    def whole(given, rhs):
        factor = cholesky.factorise(given, len(given))
        assert not isinstance(factor, cholesky.Blocked)
        return cholesky.pivots(factor), cholesky.solve(factor, rhs)

    for a, b in zip(whole(given, rhs), factor_and_solve(given, rhs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

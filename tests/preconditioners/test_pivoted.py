"""Pivoted Cholesky and the result for dependent rows, against NumPy in float64."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from efcp_jax.preconditioners import pivoted


EPS = float(np.finfo(np.float32).eps)


@jax.jit
def factorise(gram, squares, noise):
    row = lambda index: gram[index]
    return pivoted.factorise(row, jnp.diagonal(gram), squares, noise)


@jax.jit
def remedy(gram, inverse, slot):
    newest = jnp.eye(len(gram), dtype=gram.dtype)[slot]
    row, norm = lambda index: gram[index], jnp.linalg.norm(gram)
    return pivoted.solve(row, norm, inverse, newest, inverse[slot])


def problem(size, rank, spread, seed=0):
    """Return unit rows in an orthonormal basis of their span, and their norms."""
    rng = np.random.default_rng(seed + size + rank)
    made = rng.standard_normal((size, rank))
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made, 10.0 ** rng.uniform(-spread, spread, size)


def least_squares(made, weights, slot):
    """Solve made @ x = e_slot with weights, to 300 digits: float64 has too few."""
    with decimal.localcontext(prec=300):
        exact = np.vectorize(decimal.Decimal, otypes=[object])
        weighed = exact(weights)[:, None] ** 2 * exact(made)
        matrix, rhs = exact(made).T @ weighed, weighed[slot]
        for k in range(len(rhs)):
            ratio = matrix[k + 1 :, k] / matrix[k, k]
            matrix[k + 1 :] -= ratio[:, None] * matrix[k]
            rhs[k + 1 :] -= ratio * rhs[k]
        for k in reversed(range(len(rhs))):
            rhs[k] = (rhs[k] - matrix[k, k + 1 :] @ rhs[k + 1 :]) / matrix[k, k]
        return rhs.astype(np.float64)


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (6, 2), (64, 40), (300, 300)])
def test_factor_reconstructs_and_counts_the_independent_rows(size, rank):
    made, _ = problem(size, rank, 0)
    gram = (made @ made.T).astype(np.float32)
    noise = 10 * EPS * np.linalg.norm(gram)
    factor, order, found = map(np.asarray, factorise(gram, np.zeros(size), noise))
    assert found == rank
    assert sorted(order) == list(range(size))
    assert not np.any(factor[rank:])
    assert np.abs(factor.T @ factor - gram).max() <= noise
    # Lower triangular in the order of the pivots, which fall.
    basis = factor[:rank, order[:rank]].T
    assert not np.any(np.triu(basis, 1))
    assert np.all(np.diff(np.diagonal(basis)) <= 1e-5)


def test_pivots_are_the_largest_with_their_weights():
    gram = np.eye(5, dtype=np.float32)
    squares = np.log(np.asarray([1, 9, 1e-30, 1e30, 4], np.float32))
    _, order, _ = factorise(gram, squares, 1e-6)
    np.testing.assert_array_equal(order, [3, 1, 4, 0, 2])


@pytest.mark.parametrize("spread", [0, 2, 8, 28])
@pytest.mark.parametrize(
    ("size", "rank"), [(6, 2), (16, 2), (64, 8), (64, 32), (256, 32), (256, 128)]
)
def test_dependent_rows_give_the_least_squares_weighed_by_norms(size, rank, spread):
    """With norms that differ by up to 56 orders, of which no square is a float32."""
    made, norms = problem(size, rank, spread)
    gram, inverse = (np.asarray(x, np.float32) for x in (made @ made.T, 1 / norms))
    slot = int(np.argmax(norms))
    result = np.asarray(remedy(gram, inverse, slot), np.float64)
    wanted = least_squares(made, norms / norms[slot], slot)
    assert oracles.relative_error(made.T @ result, wanted) <= 1e-4 * rank


def test_result_is_finite_for_any_norms():
    rng = np.random.default_rng(0)
    for seed in range(20):
        made, norms = problem(12, 4, 30, seed)
        gram = (made @ made.T).astype(np.float32)
        for slot in rng.integers(12, size=3):
            result = remedy(gram, (1 / norms).astype(np.float32), slot)
            assert np.all(np.isfinite(result))


def test_not_a_number_ends_in_zeros():
    gram = np.full((5, 5), np.nan, np.float32)
    assert not np.any(remedy(gram, np.ones(5, np.float32), 2))

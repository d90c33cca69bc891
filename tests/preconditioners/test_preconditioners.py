"""Coefficients from the Gram matrix: against d x d, and where that has no answer."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from efcp_jax.preconditioners import ggt_coefficients, mfac_coefficients
from efcp_jax.preconditioners.gram import ages


M, D = 6, 20

mfac_solve = jax.jit(lambda *given: mfac_coefficients(*given)[0])
ggt_solve = jax.jit(ggt_coefficients)


def problem(scale=1.0, seed=0):
    """Return rows, their powers of two and the Gram matrix of what is left of them."""
    rows = np.random.default_rng(seed).normal(size=(M, D)) * np.asarray(scale)
    powers = 2.0 ** np.ceil(np.log2(np.abs(rows).max(axis=1)))
    stored = (rows / powers[:, None]).astype(np.float32)
    gram = stored.astype(np.float64) @ stored.astype(np.float64).T
    gram, powers = jnp.asarray(gram, jnp.float32), jnp.asarray(powers, jnp.float32)
    return stored, powers, gram


def oldest_first(stored, powers, slot):
    rows = np.asarray(stored, np.float64) * np.asarray(powers, np.float64)[:, None]
    return [rows[(slot + 1 + i) % M] for i in range(M)]


@pytest.mark.parametrize("slot", [0, 3, M - 1])
@pytest.mark.parametrize("damping", [1e3, 1.0, 1e-3, 1e-6])
def test_mfac_equals_the_dense_inverse(damping, slot):
    stored, powers, gram = problem()
    weights = mfac_solve(gram, powers, slot, damping, M)
    rows = oldest_first(stored, powers, slot)
    update = stored.astype(np.float64).T @ np.asarray(weights, np.float64)
    assert oracles.relative_error(update, oracles.mfac(rows, damping, M)) <= 1e-5


@pytest.mark.parametrize("slot", [0, 3, M - 1])
@pytest.mark.parametrize(("b1", "b2"), [(0.0, 1.0), (0.9, 1.0), (0.0, 0.7), (0.7, 0.7)])
@pytest.mark.parametrize("eps", [1e3, 1.0, 1e-3, 1e-8])
def test_ggt_equals_the_dense_inverse_root(eps, b1, b2, slot):
    stored, powers, gram = problem()
    age = ages(M, jnp.asarray(slot, jnp.int32))
    weights = ggt_solve(gram, powers, age, M, eps, b1, b2)
    update = stored.astype(np.float64).T @ np.asarray(weights, np.float64)
    expected = oracles.ggt(oldest_first(stored, powers, slot), eps, b1, b2)
    assert oracles.relative_error(update, expected) <= 1e-5


@pytest.mark.parametrize("magnitude", [1e-15, 1e-6, 1e6, 1e15])
def test_units_do_not_matter(magnitude):
    stored, powers, gram = problem(magnitude)
    rows = oldest_first(stored, powers, 0)
    damping = 0.1 * magnitude**2
    weights = np.asarray(mfac_solve(gram, powers, 0, damping, M), np.float64)
    expected = oracles.mfac(rows, damping, M)
    assert oracles.relative_error(stored.T @ weights, expected) <= 1e-5
    eps = 0.1 * magnitude
    age = ages(M, jnp.asarray(0, jnp.int32))
    weights = ggt_solve(gram, powers, age, M, eps, 0.0, 1.0)
    expected = oracles.ggt(rows, eps)
    assert oracles.relative_error(stored.T @ np.asarray(weights), expected) <= 1e-5


def test_mfac_rows_may_differ_in_norm_by_many_orders():
    stored, powers, gram = problem([[1e-12], [1e-7], [1e-3], [1.0], [1e5], [1e9]])
    # The size of what a row adds is set by its own length, so compare row by row.
    for slot in range(M):
        damping = 1e-10
        weights = np.asarray(mfac_solve(gram, powers, slot, damping, M), np.float64)
        rows = np.asarray(stored, np.float64) * np.asarray(powers, np.float64)[:, None]
        matrix = damping * np.eye(M) + rows @ rows.T / M
        balance = np.diag(1 / np.sqrt(np.diag(matrix)))
        expected = balance @ np.linalg.solve(
            balance @ matrix @ balance, balance @ np.eye(M)[slot]
        )
        assert (
            oracles.relative_error(
                weights / np.asarray(powers) / np.diag(balance),
                expected / np.diag(balance),
            )
            <= 1e-5
        )


DEGENERATE = {
    "empty": np.zeros((M, D)),
    "equal": np.ones((M, D)),
    "opposite": np.outer([1, -1, 1, -1, 1, -1], np.linspace(-1, 1, D)),
    "one-row": np.eye(M, D) * (np.arange(M) == 2)[:, None],
    "nearly-equal": 1 + 1e-6 * np.random.default_rng(0).normal(size=(M, D)),
    "two-directions": np.random.default_rng(1).normal(size=(M, 2))
    @ np.random.default_rng(2).normal(size=(2, D)),
}


@pytest.mark.parametrize("magnitude", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("given", [1e-30, 1e-12, 1e-7, 1.0])
@pytest.mark.parametrize("name", DEGENERATE)
def test_dependent_rows_never_give_nan(name, given, magnitude):
    stored = np.asarray(DEGENERATE[name], np.float32)
    gram = jnp.asarray(stored @ stored.T)
    filled = np.abs(stored).max(axis=1) > 0
    scale = jnp.asarray(np.where(filled, magnitude, 0), jnp.float32)
    age = ages(M, jnp.asarray(2, jnp.int32))
    mfac = mfac_solve(gram, scale, 2, given, M)
    ggt = ggt_solve(gram, scale, age, max(1, int(filled.sum())), given, 0.5, 0.9)
    assert np.isfinite(mfac).all()
    assert np.isfinite(ggt).all()


@pytest.mark.parametrize("damping", [1e-4, 1e-2])
def test_mfac_of_dependent_rows_equals_the_dense_inverse(damping):
    # Resolved in float32: the damping keeps the matrix away from singular.
    stored = np.asarray(DEGENERATE["two-directions"], np.float32)
    gram = jnp.asarray(stored.astype(np.float64) @ stored.T, jnp.float32)
    weights = np.asarray(mfac_solve(gram, jnp.ones(M), 2, damping, M), np.float64)
    expected = oracles.mfac(oldest_first(stored, np.ones(M), 2), damping, M)
    error = oracles.relative_error(stored.T.astype(np.float64) @ weights, expected)
    assert error <= 1e-7 / damping * np.linalg.norm(gram)


def test_small_damping_gives_a_product_of_m_with_the_row():
    # <u, c> goes to m, which is why learning rates near 1 / m are natural.
    stored, powers, gram = problem()
    weights = np.asarray(mfac_solve(gram, powers, 1, 1e-8, M), np.float64)
    row = stored[1].astype(np.float64) * float(powers[1])
    assert abs(row @ (stored.T @ weights) - M) <= 1e-4 * M


def test_small_eps_gives_updates_of_length_one():
    stored, powers, gram = problem()
    age = ages(M, jnp.asarray(1, jnp.int32))
    weights = np.asarray(ggt_solve(gram, powers, age, M, 1e-8, 0.0, 1.0), np.float64)
    assert abs(np.linalg.norm(stored.T @ weights) - 1) <= 1e-5


@pytest.mark.parametrize("solver", ["mfac", "ggt"])
def test_a_batch_of_sound_and_dependent_windows_equals_one_by_one(solver):
    batch = [problem()[0], np.asarray(DEGENERATE["equal"], np.float32)]
    batch = [jnp.asarray(stored @ stored.T) for stored in batch]
    age, ones = ages(M, jnp.asarray(0, jnp.int32)), jnp.ones(M)

    def solve(gram):
        if solver == "mfac":
            return mfac_coefficients(gram, ones, 0, 1e-9, M)[0]
        return ggt_coefficients(gram, ones, age, M, 1e-3, 0.0, 1.0)

    together = jax.jit(jax.vmap(solve))(jnp.stack(batch))
    for gram, result in zip(batch, together, strict=True):
        alone = jax.jit(solve)(gram)
        np.testing.assert_allclose(result, alone, rtol=1e-4, atol=1e-6)

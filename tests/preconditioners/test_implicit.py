"""Derivatives of the coefficients, in closed form where rows depend on each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efcp_jax.preconditioners import (
    ggt_coefficients,
    gram as grams,
    mfac_coefficients,
    system as systems,
)


pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.whole]

M, D, SLOT = 4, 6, 2
RNG = np.random.default_rng(0)
ROWS, CHANGE = RNG.normal(size=(2, M, D))
MIX = RNG.normal(size=(M, 2))
COS = RNG.normal(size=D)
EMPTY = np.array([1.0, 0.0, 1.0, 0.0])[:, None]


def update(kind, ridge, rows):
    """Return what the coefficients of rows, over powers of two, make of them."""
    peaks = jnp.max(jnp.abs(jax.lax.stop_gradient(rows)), axis=1)
    scale = jnp.where(peaks > 0, 2.0 ** jnp.ceil(jnp.log2(peaks)), 0)
    stored = rows / jnp.where(scale > 0, scale, 1)[:, None]
    gram, slot = stored @ stored.T, jnp.int32(SLOT)
    if kind == "mfac":
        return stored.T @ mfac_coefficients(gram, scale, slot, ridge, M)[0]
    age = grams.ages(M, slot)
    return stored.T @ ggt_coefficients(gram, scale, age, jnp.int32(M), ridge, 0.0, 1.0)


def dense(kind, ridge, rows):
    """Return the update by the matrices of the rows' span, which never is singular."""
    basis = jnp.linalg.qr(rows.T)[0][:, :2]
    inside = rows @ basis
    square = inside.T @ inside
    if kind == "mfac":
        matrix = square / M
    else:
        # The root of a 2 x 2 matrix (Cayley and Hamilton).
        root = jnp.sqrt(jnp.linalg.det(square))
        matrix = square + root * jnp.eye(2)
        matrix = matrix / jnp.sqrt(jnp.trace(square) + 2 * root)
    shifted = matrix + ridge * jnp.eye(2)
    return basis @ jnp.linalg.solve(shifted, inside[SLOT])


def loss_of(function, kind, rows, change):
    """Return a loss of the ridge and of a step from `rows` along `change`."""

    def loss(given):
        return jnp.sum(
            jnp.sin(function(kind, given[0], rows + given[1] * change)) * COS
        )

    return loss


def both(loss, given):
    modes = jax.jit(lambda x: (jax.jacfwd(loss)(x), jax.grad(loss)(x)))
    return map(np.asarray, modes(jnp.asarray(given)))


def central(function, given, small=1e-6):
    steps = small * jnp.eye(len(given))
    compiled = jax.jit(function)
    return np.asarray(
        [(compiled(given + e) - compiled(given - e)) / (2 * small) for e in steps]
    )


every_kind = pytest.mark.parametrize("kind", ["mfac", "ggt"])


@every_kind
@pytest.mark.parametrize(
    "rows",
    [ROWS, EMPTY * ROWS, np.eye(M, D), np.tile(ROWS[:1], (M, 1)), MIX @ ROWS[:2]],
    ids=["any", "empty slots", "equal eigenvalues", "one row repeated", "rank 2"],
)
def test_equals_central_differences(kind, rows):
    change = CHANGE * np.any(rows, axis=1, keepdims=True)
    loss, given = loss_of(update, kind, rows, change), np.array([0.3, 0.0])
    expected = central(loss, given)
    for found in both(loss, given):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@every_kind
def test_second_derivatives_equal_central_differences(kind):
    loss, given = loss_of(update, kind, np.eye(M, D), CHANGE), np.array([0.3, 0.0])
    second = np.asarray(jax.jit(jax.hessian(loss))(given))
    expected = central(jax.grad(loss), given, 1e-5)
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-6)


@every_kind
@pytest.mark.parametrize("ridge", [1e-4, 1e-20, 0.0])
def test_dependent_rows_have_the_derivative_of_their_span(kind, ridge):
    """The ridge as good as none: rows that depend on others leave a singular system."""
    given = MIX @ ROWS[:2], MIX @ CHANGE[:2]
    wanted = jax.jit(jax.grad(loss_of(dense, kind, *given)))
    wanted = np.asarray(wanted(jnp.asarray([ridge, 0.0])))
    for found in both(loss_of(update, kind, *given), [ridge, 0.0]):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.slow
def test_a_factorisation_that_was_kept(monkeypatch):
    monkeypatch.setattr(systems, "_SMALLEST", M)
    monkeypatch.setattr(systems, "_RUN", 2)
    kept = systems.empty(M, jnp.float64)
    scale, slot = jnp.ones(M), jnp.int32(SLOT)
    gram = jnp.asarray(ROWS @ ROWS.T)
    _, kept = mfac_coefficients(gram, scale, slot, 0.3, M, kept)

    def with_kept(kind, ridge, rows):
        del kind
        nearest = systems.near(ridge, kept)
        weights, after = mfac_coefficients(rows @ rows.T, scale, slot, nearest, M, kept)
        assert after is not None
        return rows.T @ weights * after.damping

    def afresh(kind, ridge, rows):
        # The damping is the one that was kept, which depends on nothing here.
        return update(kind, 0.3 + 0 * ridge, rows) * 0.3

    change = CHANGE * (np.arange(M) == SLOT)[:, None]
    wanted = both(loss_of(afresh, "mfac", ROWS, change), [0.31, 0.0])
    found = both(loss_of(with_kept, "mfac", ROWS, change), [0.31, 0.0])
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8)

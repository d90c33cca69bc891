"""Degenerate windows have a stated result, and it is never NaN."""

import numpy as np
import oracles
import pytest
from small_runs import (
    F32,
    LOSSLESS,
    SHAPE,
    D,
    every_kind,
    every_lossless,
    random,
    run,
    vectors,
)

import efcp_jax


@every_kind
@pytest.mark.parametrize("name", [*LOSSLESS, "bf16", "f16-blocks"])
def test_zero_gradients_from_the_first_step_give_zero_updates(kind, name):
    for strength in (1e-2, 0.0):
        updates, state = run(kind, name, 4, [np.zeros(SHAPE, np.float32)] * 6, strength)
        assert not np.any(updates)
        assert not np.any(state.gram)
        assert state.skipped == 0


@every_lossless
def test_mfac_of_one_gradient_repeated_is_its_closed_form(name):
    [gradient] = random(1)
    c, m = gradient.ravel().astype(np.float64), 4
    for damping in (1e-1, 1e-3):
        updates, _ = run("mfac", name, m, [gradient] * 7, damping)
        for t, update in enumerate(updates, start=1):
            expected = c / (damping + c @ c * min(t, m) / m)
            # The repeated rows differ from a singular system by the damping alone.
            condition = c @ c / damping
            error = oracles.relative_error(update, expected)
            assert error < 10 * condition * F32.eps


@every_lossless
def test_mfac_of_one_gradient_repeated_is_finite_at_any_damping(name):
    [gradient] = random(1)
    c, m = gradient.ravel().astype(np.float64), 4
    for damping in (1e-12, 0.0, -1e-9):
        updates, _ = run("mfac", name, m, [gradient] * 7, damping)
        for t, update in enumerate(updates, start=1):
            # Directions that rounding makes up are dropped: the pseudo-inverse.
            expected = c * m / (c @ c * min(t, m))
            assert oracles.relative_error(update, expected) < 1e-5


@every_lossless
def test_ggt_of_one_gradient_repeated_is_its_closed_form(name):
    [gradient] = random(1)
    c, m = gradient.ravel().astype(np.float64), 4
    for eps in (1.0, 1e-2, 1e-4, 0.0):
        updates, _ = run("ggt", name, m, [gradient] * 7, eps)
        for t, update in enumerate(updates, start=1):
            norm = np.linalg.norm(c)
            expected = c / (norm * np.sqrt(min(t, m)) + eps)
            # Rounding in the null space of equal rows is divided by the floor.
            assert oracles.relative_error(update, expected) < 2 * np.sqrt(F32.eps)


@every_kind
@every_lossless
def test_exactly_dependent_rows_give_the_float64_update(kind, name):
    one, two = random(2)
    gradients = [one, 2 * one, two, one + two, -one, two - one, one, 0 * one, two]
    updates, _ = run(kind, name, 4, gradients, 1e-1)
    for t, update in enumerate(updates):
        rows = vectors(gradients)[max(0, t - 3) : t + 1]
        if kind == "mfac":
            expected = oracles.mfac(rows, 1e-1, 4)
        else:
            expected = oracles.ggt(rows, 1e-1)
        assert oracles.relative_error(update, expected) < 1e-4


@every_kind
@every_lossless
def test_dependent_rows_without_damping_give_the_pseudo_inverse(kind, name):
    one, two = random(2)
    gradients = [one, 2 * one, two, one + two, -one, two - one, one]
    updates, _ = run(kind, name, 4, gradients, 0.0)
    for t, update in enumerate(updates):
        rows = np.array(vectors(gradients)[max(0, t - 3) : t + 1])
        _, singular, right = np.linalg.svd(rows, full_matrices=False)
        # The sums were rounded to float32, so dependent to 1e-7 only.
        kept = singular > 1e-6 * singular[0]
        power = 4 / singular[kept] ** 2 if kind == "mfac" else 1 / singular[kept]
        expected = right[kept].T @ (power * (right[kept] @ rows[-1]))
        assert oracles.relative_error(update, expected) < 3e-3


NORMS = 10.0 ** np.array([0, -30, 30, -12, 15, -20, 7, -3, 28, -28, 19, -19.0])


@pytest.mark.parametrize("damping", [1e-12, 1.0, 1e12, 0.0])
@every_lossless
def test_mfac_holds_norms_from_1e_minus_30_to_1e30_in_one_window(name, damping):
    rows = (np.diag(NORMS).reshape(D, *SHAPE)).astype(np.float32)
    updates, _ = run("mfac", name, D, list(rows), damping)
    for row, update in zip(vectors(rows), updates, strict=True):
        expected = row / (np.float64(np.float32(damping)) + row @ row / D)
        if np.max(expected) < F32.tiny:  # flushed to zero
            assert np.max(np.abs(update)) < 2 * F32.tiny
        else:
            assert oracles.relative_error(update, expected) < 1e-5


@every_lossless
def test_ggt_resolves_norms_down_to_the_root_of_the_rounding_unit(name):
    rows = (np.diag(NORMS).reshape(D, *SHAPE)).astype(np.float32)
    updates, _ = run("ggt", name, D, list(rows), 1e-3)
    largest = 0.0
    for row, update in zip(vectors(rows), updates, strict=True):
        norm = np.linalg.norm(row)
        largest = max(largest, norm)
        # Singular values below the floor are taken to be the floor.
        expected = row / (max(norm, np.sqrt(F32.eps) * largest) + 1e-3)
        assert np.linalg.norm(update - expected) <= 1e-4 * np.linalg.norm(
            expected
        ) + 2 * float(F32.tiny)


@every_lossless
def test_a_damping_of_1e_minus_12_gives_the_float64_update(name):
    gradients = random(9)
    updates, _ = run("mfac", name, 4, gradients, 1e-12)
    for t, update in enumerate(updates):
        rows = np.array(vectors(gradients)[max(0, t - 3) : t + 1])
        # 1e-12 is below the rounding of a d x d system, so by the rows.
        system = 1e-12 * np.eye(len(rows)) + rows @ rows.T / 4
        expected = rows.T @ np.linalg.solve(system, np.eye(len(rows))[-1])
        assert oracles.relative_error(update, expected) < 1e-4


def test_a_damping_of_zero_is_an_error_and_an_eps_of_zero_is_not():
    with pytest.raises(ValueError, match="`damping` must be in"):
        efcp_jax.scale_by_mfac(4, 0.0)
    efcp_jax.scale_by_ggt(4, 0.0)

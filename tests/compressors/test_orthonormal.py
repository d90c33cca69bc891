"""Orthonormal bases by small factors, written out and by the library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efcp_jax.compressors.thin import orthonormal
from efcp_jax.devices.collectives import together


@jax.jit
def bases(matrices):
    return together([orthonormal(matrices, ()), orthonormal(2 * matrices, ())])


every_rank = pytest.mark.parametrize("rank", [1, 2, 4, 5, 9])


@every_rank
def test_rows_are_orthonormal_and_span_the_same_space(rank):
    rng = np.random.default_rng(rank)
    # Lengths over ten decades.
    lengths = np.geomspace(1e-5, 1e5, rank)[:, None]
    matrices = (lengths * rng.normal(size=(3, rank, 40))).astype(np.float32)
    for found in bases(matrices):
        for matrix, basis in zip(matrices, np.asarray(found, np.float64), strict=True):
            np.testing.assert_allclose(basis @ basis.T, np.eye(rank), atol=2e-5)
            rows = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
            np.testing.assert_allclose(rows @ basis.T @ basis, rows, atol=2e-4)


@every_rank
def test_zero_rows_stay_zero_and_others_are_as_if_alone(rank):
    matrices = np.random.default_rng(rank).normal(size=(2, rank, 30))
    matrices[0, 0] = 0
    found, _ = bases(jnp.asarray(matrices, jnp.float32))
    assert not np.any(found[0, 0])
    rest = np.asarray(found[0, 1:], np.float64)
    np.testing.assert_allclose(rest @ rest.T, np.eye(rank - 1), atol=2e-5)


@pytest.mark.parametrize("rank", [2, 4, 5, 9])
def test_dependent_rows_give_finite_directions_of_length_one_at_most(rank):
    row = np.random.default_rng(rank).normal(size=30)
    matrices = jnp.asarray(np.stack([[row] * rank]), jnp.float32)
    found, _ = bases(matrices)
    assert np.all(np.isfinite(found))
    assert np.linalg.norm(np.asarray(found[0], np.float64), 2) < 1 + 1e-4
    # The space that was given is kept.
    unit = row / np.linalg.norm(row)
    kept = np.asarray(found[0], np.float64) @ unit
    assert np.linalg.norm(kept) > 1 - 1e-3

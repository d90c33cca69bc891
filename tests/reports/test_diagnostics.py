"""Diagnostics against NumPy on the textbook's rows."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efcp_jax


M = cases.WINDOW

diagnose = jax.jit(efcp_jax.diagnostics)


def effective_rank(spectrum):
    shares = spectrum[spectrum > 0] / spectrum.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


@pytest.mark.parametrize("count", [1, 3, M, 2 * M + 1])
@pytest.mark.parametrize("method", ["mfac", "ggt"])
@pytest.mark.parametrize("name", ["identity", "top_k-blocks", "low_rank-per-leaf"])
def test_figures_equal_numpy(name, method, count):
    result = cases.compressed_run(method, name)
    state = jax.tree.map(jnp.asarray, cases.at(result.states, count - 1))
    figures = diagnose(state)
    assert figures["count"] == count
    assert figures["skipped"] == 0
    rows = result.rows[:count]
    assert float(figures["window_fill"]) == pytest.approx(min(count, M) / M)
    norm = np.linalg.norm(rows[-1])
    assert float(figures["row_norm"]) == pytest.approx(norm, rel=1e-5)
    if name == "identity":
        assert "error_norm" not in figures
        assert "error_ratio" not in figures
    else:
        # What has come in and not gone out.
        error = np.sum(result.gradients[:count], axis=0) - np.sum(rows, axis=0)
        norms = np.linalg.norm(error), norm
        assert float(figures["error_norm"]) == pytest.approx(norms[0], rel=1e-5)
        ratio = norms[0] ** 2 / (norms[0] ** 2 + norms[1] ** 2)
        assert float(figures["error_ratio"]) == pytest.approx(ratio, rel=1e-5)
    window = np.zeros((M, cases.SIZE))
    window[: min(count, M)] = rows[-M:]
    spectra = cases.products_by_leaf(name, figures["spectrum"])
    ranks = cases.products_by_leaf(name, figures["effective_rank"])
    parts = cases.parts(name)
    assert len(spectra) == len(ranks) == len(parts)
    for spectrum, rank, part in zip(spectra, ranks, parts, strict=True):
        gram = window[:, part] @ window[:, part].T
        expected = np.linalg.eigvalsh(gram)
        tolerance = 1e-5 * expected[-1]
        np.testing.assert_allclose(spectrum, expected, rtol=0, atol=tolerance)
        expected_rank = effective_rank(np.maximum(expected, 0))
        assert float(rank) == pytest.approx(expected_rank, rel=1e-3)


def test_a_fresh_state_has_zeros():
    tx = efcp_jax.sparse_mfac(0.1, window_size=3, density=0.5)
    figures = efcp_jax.diagnostics(tx.init(cases.params()))
    assert all(not np.asarray(value).any() for value in figures.values())


def test_skipped_steps_are_counted():
    tx = efcp_jax.sparse_ggt(0.1, window_size=3, density=0.5)
    gradients = cases.gradients(4)
    gradients["bias"] = gradients["bias"].at[jnp.array([1, 3]), 2].set(jnp.nan)
    _, states = cases.run(tx, gradients, cases.params())
    figures = efcp_jax.diagnostics(cases.at(states, 3))
    assert figures["count"] == 4
    assert figures["skipped"] == 2
    assert float(figures["window_fill"]) == pytest.approx(2 / 3)


def test_error_feedback_alone_has_an_error_norm():
    tx = optax.chain(efcp_jax.error_feedback(efcp_jax.top_k(0.5)), optax.adam(1e-3))
    gradient = jnp.array([4.0, 3.0, 2.0, 1.0])
    _, state = tx.update(gradient, tx.init(gradient))
    figures = efcp_jax.diagnostics(state)
    assert set(figures) == {"count", "skipped", "error_norm"}
    assert float(figures["error_norm"]) == pytest.approx(np.sqrt(5.0))


def test_a_wrapped_state_is_found():
    tx = optax.masked(efcp_jax.mfac(0.1, window_size=2), True)
    inject = optax.inject_hyperparams(
        efcp_jax.mfac, static_args=("window_size", "divisor")
    )
    tx = optax.chain(optax.clip(1.0), inject(0.1, window_size=2))
    figures = efcp_jax.diagnostics(tx.init(cases.params()))
    assert figures["spectrum"].shape == (2,)


@pytest.mark.parametrize("count", [0, 2])
def test_a_state_of_none_or_two_of_ours_is_refused(count):
    tx = optax.chain(optax.adam(1e-3), *[efcp_jax.scale_by_mfac(2)] * count)
    with pytest.raises(ValueError, match=f"`state` must contain exactly one.*{count}"):
        efcp_jax.diagnostics(tx.init(cases.params()))


def test_norms_far_from_one_do_not_overflow():
    tx = efcp_jax.sparse_mfac(0.1, window_size=2, density=0.5, metric=None)
    unit = 2.0**84  # about 2e25; every dtype holds its multiples
    gradient = unit * jnp.array([4.0, 3.0, 2.0, 1.0])
    _, state = tx.update(gradient, tx.init(gradient), gradient)
    figures = efcp_jax.diagnostics(state)
    assert float(figures["row_norm"]) == pytest.approx(5 * unit, rel=1e-5)
    assert float(figures["error_norm"]) == pytest.approx(np.sqrt(5) * unit, rel=1e-5)
    assert float(figures["error_ratio"]) == pytest.approx(5 / 30, rel=1e-5)

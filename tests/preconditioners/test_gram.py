"""The Gram matrix under replacement of rows, and their ages."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efcp_jax.preconditioners import gram as grams


M = 5


def test_replaced_rows_give_the_gram_matrix_of_the_window():
    rng = np.random.default_rng(0)
    window, gram = np.zeros((M, 7)), jnp.zeros((M, M))
    replace = jax.jit(grams.replace)
    for t in range(3 * M):
        slot = t % M
        window[slot] = rng.normal(size=7)
        products = jnp.asarray(window @ window[slot], jnp.float32)
        gram = replace(gram, products, slot, True)
        np.testing.assert_allclose(gram, window @ window.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(gram, gram.T)


def test_a_rejected_row_leaves_the_gram_matrix_as_it_was():
    gram = jnp.asarray(np.random.default_rng(1).normal(size=(M, M)), jnp.float32)
    gram = gram + gram.T
    kept = jax.jit(grams.replace)(gram, jnp.full(M, jnp.nan), 2, False)
    np.testing.assert_array_equal(kept, gram)


@pytest.mark.parametrize("slot", range(M))
def test_ages_count_back_from_the_newest_row(slot):
    ages = [None] * M
    for age in range(M):
        ages[slot - age] = age
    result = grams.ages(M, jnp.asarray(slot, jnp.int32))
    np.testing.assert_array_equal(result, ages)
    assert result.dtype == jnp.int32


@pytest.mark.parametrize("name", cases.REPRESENTATIONS)
def test_gram_in_the_state_is_that_of_the_stored_rows(name):
    result = cases.compressed_run("mfac", name)
    for count in (1, 3, cases.WINDOW, 2 * cases.WINDOW + 1, cases.STEPS):
        state = cases.at(result.states, count - 1)
        rows = np.zeros((cases.WINDOW, cases.SIZE))
        for t in range(max(0, count - cases.WINDOW), count):
            rows[t % cases.WINDOW] = result.rows[t]
        scale = state.window.scale.astype(np.float64)
        leaves = cases.products_by_leaf(name, state.gram)
        for gram, part in zip(leaves, cases.parts(name), strict=True):
            expected = rows[:, part] @ rows[:, part].T
            scaled = scale[:, None] * gram * scale
            np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-4)

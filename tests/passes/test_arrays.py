"""Whole arrays: what is not finite is found, and the scale of a row is above it all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efcp_jax.passes import finite, row_scale


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0])
def test_one_entry_that_is_not_finite_is_found(platform, value, pretend):
    pretend(platform)
    leaves = [jnp.zeros((3, 5)), jnp.zeros(0), jnp.full(7, 3e38).at[4].set(value)]
    kinds = [leaves[:1] * 2, leaves[1:2], leaves[2:]]
    found = finite(kinds, lambda: leaves)
    assert found == np.isfinite(value)


def test_row_scale_is_the_power_of_two_above_the_largest_magnitude():
    leaf = np.asarray([[0.5, -3, 1]], np.float32)
    for tree, wanted in [
        ([leaf, leaf], 4),
        ([-leaf, leaf / 64], 4),
        ([leaf[:, :0], leaf / 2], 2),
        ([0 * leaf], 0),
        ([], 0),
    ]:
        scale, inverse = row_scale(jax.tree.map(jnp.asarray, tree), True)
        assert scale == wanted
        assert inverse == (1 / wanted if wanted else 0)

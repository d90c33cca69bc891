"""What is not finite in a gradient is found, in either form."""

import jax.numpy as jnp
import numpy as np
import pytest

from efcp_jax.passes import finite


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0])
def test_one_entry_that_is_not_finite_is_found(platform, value, pretend):
    pretend(platform)
    leaves = [jnp.zeros((3, 5)), jnp.zeros(0), jnp.full(7, 3e38).at[4].set(value)]
    found = finite(lambda: iter(leaves), lambda: leaves)
    assert found == np.isfinite(value)

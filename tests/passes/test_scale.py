"""The scale of a row is a power of two above all of its entries."""

import jax
import jax.numpy as jnp
import numpy as np

from efcp_jax.passes import row_scale


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

"""Inner products of stored rows with any vector, and their adjoint."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from efcp_jax import top_k
from efcp_jax.compressors import ROW_AXIS
from efcp_jax.devices.placement import layout


M = 4
COMPRESSORS = {
    **cases.COMPRESSORS,
    "by_label": cases.MIXED,
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_dot_is_that_of_the_dense_rows_and_the_transpose_of_combine(name):
    space = COMPRESSORS[name].bind(layout(cases.params(), jnp.float32, None))
    flat = lambda tree: oracles.flat(jax.tree.leaves(space.unpack(tree)))
    stacked = cases.gradients(M + 1)
    basis, rows = space.zeros()[2], []
    for t in range(M):
        # Of different magnitudes, so that 8 bits have a different scale in every row.
        vector = jax.tree.map(
            lambda x, t=t: 4.0**t * x, space.pack(cases.at(stacked, t))
        )
        row, _, basis = space.compress(vector, basis, False)
        rows.append(row)
    window = jax.tree.map(lambda *x: jnp.concatenate(x, axis=ROW_AXIS), *rows)
    dense = np.array([flat(space.expand(row)) for row in rows])
    vector = space.pack(cases.at(stacked, M))
    products = jax.jit(space.dot)(window, vector)
    grams = cases.products_by_leaf(name, products)
    for gram, part in zip(grams, cases.parts(name), strict=True):
        expected = dense[:, part] @ flat(vector)[part]
        largest = np.abs(expected).max()
        np.testing.assert_allclose(gram, expected, rtol=1e-5, atol=1e-6 * largest)
    # <G x, w> = <x, G^T w>, for weights of every Gram matrix.
    weights = jax.tree.map(lambda k: jnp.cos(jnp.arange(k.size) * 1.0), products)
    weights = jax.tree.map(lambda w, k: w.reshape(k.shape), weights, products)
    left = sum(
        np.vdot(a, b)
        for a, b in zip(*map(jax.tree.leaves, (products, weights)), strict=True)
    )
    right = np.vdot(flat(vector), flat(space.combine(window, weights)))
    assert left == pytest.approx(right, rel=1e-5)
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), vector)
    both = jax.vmap(lambda x: space.dot(window, x))(several)
    for a, b in zip(*map(jax.tree.leaves, (both, products)), strict=True):
        tolerance = 1e-6 * np.abs(b).max()
        np.testing.assert_allclose(a[1], 2 * b, rtol=1e-5, atol=tolerance)


def test_sparse_windows_are_read_a_few_tiles_at_a_time():
    size, window = 1 << 20, 64
    half = {"value_dtype": jnp.bfloat16}
    compressor = top_k(0.5, block_size=128, **half)
    space = compressor.bind(layout(jnp.zeros(size), jnp.float32, None))
    row = space.zeros()[1]
    rows = jax.tree.map(lambda x: jnp.concatenate([x] * window, ROW_AXIS), row)
    program = jax.jit(space.dot).lower(rows, space.zeros()[0]).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(rows))
    assert program.memory_analysis().temp_size_in_bytes < held / 20

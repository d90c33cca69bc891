"""Every representation against the vectors it stands for."""

import functools
from typing import Any, NamedTuple

import cases
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import efcp_jax
from efcp_jax.compressors import ROW_AXIS, Compressor, of_grams
from efcp_jax.devices.placement import layout
from efcp_jax.passes.entries import Storage


M = 4

every_compressor = pytest.mark.parametrize("name", cases.COMPRESSORS)


class Facts(NamedTuple):
    """What one space makes of `M` gradients in a window and one more row."""

    gradient: Any
    restored: Any
    types: dict[str, tuple]
    nothing: Any
    dense: Any
    products: Any
    weights: Any
    combined: Any
    matrices: dict[str, Any]


@functools.cache
def facts(name) -> Facts:
    """Ask everything of one space in one compiled function."""
    space = cases.bound(name)
    is_sparse = name in cases.TOP_K
    types = {}

    def record(key, *trees):
        of = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        types[key] = tuple(of(tree) for tree in trees)

    @jax.jit
    def ask(gradients, given):
        vector, zero, basis = space.zeros()
        record("basis", basis)
        rows = []
        for t in range(M + 1):
            vector_t = space.pack(cases.at(gradients, t))
            row, _, basis = space.compress(vector_t, basis, False)
            rows.append(row)
        record("vector", vector, space.pack(cases.at(gradients, 0)), space.expand(row))
        record("row", zero, row)
        types["basis"] += (jax.tree.map(lambda x: (x.shape, x.dtype), basis),)
        window = jax.tree.map(lambda *x: jnp.concatenate(x, axis=ROW_AXIS), *rows[:M])
        combine = lambda each: space.combine(window, each)
        # A weight for every row in every Gram matrix there is.
        weights = of_grams(space.counts, given)
        matrices = {"combine": matrix(combine, weights, space.unpack)}
        if name not in cases.LOW_RANK:
            # What a row is linear in: its values, the offsets being held fixed.
            values, rebuild = row, lambda v: v
            if is_sparse:
                values, offsets = space.storage.load(row, space.layout.dtype)
                rebuild = lambda v: space.storage.store(v, offsets)
            inner = lambda v: space.inner(window, rebuild(v))
            expand = lambda v: space.expand(rebuild(v))
            matrices["inner"] = matrix(inner, values)
            matrices["expand"] = matrix(expand, values, space.unpack)
        return Facts(
            gradient=cases.at(gradients, 0),
            restored=space.unpack(space.pack(cases.at(gradients, 0))),
            types={},
            nothing=space.unpack(space.expand(zero)),
            dense=[space.unpack(space.expand(each)) for each in rows],
            products=space.inner(window, row),
            weights=given,
            combined=space.unpack(combine(weights)),
            matrices=matrices,
        )

    weights = np.random.default_rng(1).normal(size=M)
    result = ask(cases.gradients(M + 1), jnp.asarray(weights, jnp.float32))
    return jax.device_get(result)._replace(types=types)


def matrix(function, like, unpack=lambda result: result):
    """Return what a linear function makes of each unit vector, as rows."""
    units, tree_of = jax.flatten_util.ravel_pytree(like)
    units = jnp.eye(units.size, dtype=units.dtype)
    return lax.map(lambda unit: unpack(function(tree_of(unit))), units)


def flat(tree):
    return oracles.flat(jax.tree.leaves(tree))


def transposed(columns):
    """Return the matrix whose columns `matrix` found, transposed, in float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(columns)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


@every_compressor
def test_space_keeps_its_contract(name):
    known = facts(name)
    jax.tree.map(np.testing.assert_array_equal, known.restored, known.gradient)
    for types in known.types.values():
        assert all(each == types[0] for each in types)
    assert not flat(known.nothing).any()


@every_compressor
def test_inner_and_combine_agree_with_expanded_rows(name):
    known = facts(name)
    dense = np.array([flat(row) for row in known.dense])
    grams = cases.products_by_leaf(name, known.products)
    for gram, part in zip(grams, cases.parts(name), strict=True):
        expected = dense[:M, part] @ dense[M, part]
        np.testing.assert_allclose(gram, expected, rtol=1e-5, atol=1e-5)
    expected = known.weights @ dense[:M]
    np.testing.assert_allclose(flat(known.combined), expected, rtol=1e-5, atol=1e-5)


@every_compressor
def test_inner_is_the_transpose_of_combine(name):
    known = facts(name)
    products = np.concatenate([np.ravel(k) for k in jax.tree.leaves(known.products)])
    expected = transposed(known.matrices["combine"]) @ flat(known.dense[-1])
    np.testing.assert_allclose(products, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*cases.IDENTITY, *cases.TOP_K])
def test_combine_is_the_transpose_of_inner_to_the_last_bit(name):
    # A unit vector picks entries of the window and adds zeros: nothing is rounded.
    known = {key: transposed(found) for key, found in facts(name).matrices.items()}
    expected = known["expand"] @ known["combine"].T
    assert expected.any()
    np.testing.assert_array_equal(known["inner"], expected)


@pytest.mark.parametrize("name", cases.TOP_K)
def test_top_k_keeps_the_largest_entries_of_each_block(name):
    known = facts(name)
    gradients = cases.vectors(cases.gradients(M + 1), np.float32)
    for row, vector in zip(known.dense, gradients, strict=True):
        expected = cases.oracle_compressor(name)(vector)
        np.testing.assert_array_equal(flat(row), expected)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1, "uint8"),
        (256, "uint8"),
        (257, "uint16"),
        (65_536, "uint16"),
        (65_537, "int32"),
    ],
)
def test_offsets_take_the_smallest_type_that_holds_a_block(size, dtype):
    assert Storage.of(np.dtype(np.float32), size).offsets == dtype
    model = jax.ShapeDtypeStruct((3 * size,), jnp.float32)
    compressor = efcp_jax.top_k(0.01, block_size=size)
    state = jax.eval_shape(efcp_jax.scale_by_mfac(2, compressor=compressor).init, model)
    kept = max(1, round(0.01 * size))
    assert state.window.rows.offsets.dtype == dtype
    shape = (1, 2 * kept, 3) if size <= 256 else (3, 2 * kept)  # a tile, or blocks
    assert state.window.rows.offsets.shape == shape


@pytest.mark.parametrize("size", [256, 257, 65_536, 65_537])
def test_offsets_reach_the_last_entry_of_a_block(size):
    model = jnp.zeros(2 * size)
    # Those of two small blocks lie side by side.
    places = jnp.array([2 * size - 2 if size <= 256 else size - 1, 2 * size - 1])
    gradient = model.at[places].set(jnp.array([3.0, -2.0]))
    tx = efcp_jax.error_feedback(efcp_jax.top_k(1 / size, block_size=size))
    update, _ = jax.jit(tx.update)(gradient, tx.init(model))
    np.testing.assert_array_equal(update, gradient)


def test_top_k_takes_the_first_of_equal_entries():
    space = efcp_jax.top_k(0.5).bind(layout(jnp.zeros(6), jnp.float32, None))
    vector = space.pack(jnp.array([1.0, -2, 2, -1, 1, 1]))
    row, _, _ = space.compress(vector, None, False)
    np.testing.assert_array_equal(
        flat(space.unpack(space.expand(row))), [1.0, -2.0, 2.0, 0.0, 0.0, 0.0]
    )


@pytest.mark.parametrize("name", ["low_rank", "low_rank-per-leaf"])
def test_low_rank_is_a_projection_and_follows_the_subspace_step(name, x64):
    result = cases.compressed_run("mfac", name, jnp.float64)
    kernel = slice(8, 38)  # behind the vector and the scalar
    error = np.zeros(cases.SIZE)
    for t, (row, gradient) in enumerate(
        zip(result.rows, result.gradients, strict=True)
    ):
        total = error + gradient
        error = total - row
        # Leaves that are not factorised are kept whole.
        whole = np.delete(row - total, kernel)
        assert np.abs(whole).max() <= 1e-13
        emitted, matrix = row[kernel].reshape(6, 5), total[kernel].reshape(6, 5)
        assert np.linalg.matrix_rank(emitted, tol=1e-8) <= 2
        assert np.abs(emitted.T @ (matrix - emitted)).max() <= 1e-12
        if t:  # the first basis is the package's own choice
            (basis,) = cases.at(result.states.basis, t - 1)["6x5"].transpose(0, 2, 1)
            expected, following = oracles.subspace_step(matrix, basis)
            assert oracles.relative_error(emitted, expected) <= 1e-11
            # The bases have the same span: the one projects the other on itself.
            (new,) = cases.at(result.states.basis, t)["6x5"].transpose(0, 2, 1)
            both = np.concatenate([new, following], axis=1)
            assert np.linalg.matrix_rank(both, tol=1e-8) == 2


def test_low_rank_factors_have_orthonormal_left_rows():
    states = cases.compressed_run("mfac", "low_rank").states
    rows = cases.at(states, cases.STEPS - 1).window.rows.parts["6x5"]
    for slot in range(cases.WINDOW):
        left = rows.left[0, 2 * slot : 2 * slot + 2].astype(np.float64)
        gram = left @ left.T
        np.testing.assert_allclose(gram, np.eye(2), atol=1e-4)


def test_low_rank_converges_to_the_best_approximation_of_a_constant_matrix():
    rng = np.random.default_rng(5)
    u, _ = np.linalg.qr(rng.normal(size=(20, 4)))
    v, _ = np.linalg.qr(rng.normal(size=(10, 4)))
    singular = np.array([8.0, 4.0, 1.0, 0.5])
    matrix = jnp.asarray(u * singular @ v.T, jnp.float32)
    tx = efcp_jax.scale_by_mfac(
        1, compressor=efcp_jax.low_rank(2), error_feedback=False
    )
    _, states = cases.run(tx, jnp.stack([matrix] * 12), jnp.zeros((20, 10)))
    space = efcp_jax.low_rank(2).bind(layout(matrix, jnp.float32, None))
    (emitted,) = cases.low_rank_row(space, cases.at(states, 11))
    best = u[:, :2] * singular[:2] @ v[:, :2].T
    assert oracles.relative_error(emitted, best) <= 1e-5


def test_low_rank_survives_zero_gradients():
    matrix = np.random.default_rng(6).normal(size=(8, 6))
    stacked = np.zeros((5, 8, 6))
    stacked[[0, 3, 4]] = matrix
    tx = efcp_jax.error_feedback(efcp_jax.low_rank(2))
    updates, states = cases.run(
        tx, jnp.asarray(stacked, jnp.float32), jnp.zeros((8, 6))
    )
    assert np.isfinite(np.asarray(updates)).all()
    emitted = np.linalg.norm(np.asarray(updates), axis=(1, 2))
    assert emitted[3] > 0.1 * np.linalg.norm(matrix)
    error = np.asarray(states.error["8x6"][-1, 0])
    emitted = np.sum(np.asarray(updates), axis=0)
    np.testing.assert_allclose(emitted + error, stacked.sum(axis=0), atol=1e-4)


@pytest.mark.parametrize("compressor", cases.COMPRESSORS.values())
def test_compressors_are_immutable_configuration(compressor):
    assert isinstance(compressor, Compressor)
    assert not callable(compressor)
    assert hash(compressor) == hash(type(compressor)(**vars(compressor)))
    with pytest.raises(AttributeError):
        compressor.value_dtype = None

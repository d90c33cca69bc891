"""Devices that hold more entries than the 32 bits of an index tell apart."""

import functools
import warnings

import indices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efcp_jax
from efcp_jax import numerics
from efcp_jax.passes import cpu, gpu, reference, tpu
from efcp_jax.passes.entries import SparseRow, Storage
from efcp_jax.passes.forms import Form


STRUCT = jax.ShapeDtypeStruct
M = 4

COMPRESSORS = {
    "identity": efcp_jax.identity(),
    "top_k": efcp_jax.top_k(0.001),
    "blocks of 128": efcp_jax.top_k(2 / 128, block_size=128),
    "blocks of 96": efcp_jax.top_k(1 / 96, block_size=96),
    "bytes": efcp_jax.top_k(2 / 128, block_size=128, value_dtype=jnp.int8),
    "blocks of 4096": efcp_jax.top_k(0.01, block_size=4096),
    "words": efcp_jax.top_k(0.01, block_size=4096, value_dtype=jnp.bfloat16),
    "blocks of 100000": efcp_jax.top_k(0.001, block_size=100_000),
    "one block too long": efcp_jax.top_k(1e-6, block_size=2**33),
    "low_rank": efcp_jax.low_rank(4),
}


def tree(name, dtype):
    shapes = {
        "nine of 2^28": [(2**28,)] * 9,
        "2^34 and a few": [(7,), (2**34,)],
        "a matrix of 2^34": [(2**17, 2**17)],
    }
    return [STRUCT(shape, dtype) for shape in shapes[name]]


def traced(tx, params):
    """Return the program of a step, traced without one warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = jax.eval_shape(tx.init, params)
        return jax.make_jaxpr(tx.update)(params, state, params).jaxpr


WAYS = {
    "mfac": (efcp_jax.scale_by_mfac, {}),
    "mfac by leaf": (efcp_jax.scale_by_mfac, {"block_diagonal": True}),
    "mfac, metric": (
        efcp_jax.scale_by_mfac,
        {"metric": efcp_jax.diagonal_metric(), "error_dtype": jnp.bfloat16},
    ),
    "ggt": (efcp_jax.scale_by_ggt, {}),
    "ggt, bytes": (efcp_jax.scale_by_ggt, {"error_dtype": jnp.int8}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_no_index_of_any_platform_is_beyond_its_reach(name, many, way):
    one = "a matrix of 2^34" if name == "low_rank" else "2^34 and a few"
    shapes = "nine of 2^28" if many else one
    make, given = WAYS[way]
    tx = make(M, compressor=COMPRESSORS[name], **given)
    program = traced(tx, tree(shapes, jnp.bfloat16))
    assert not list(indices.too_far(program))


@pytest.mark.parametrize("alias", ["sparse_ggt", "sparse_mfac", "ggt", "low_rank_mfac"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_optimizers_as_they_are(alias, dtype):
    tx = getattr(efcp_jax, alias)(1.0, window_size=16, weight_decay=0.1)
    program = traced(efcp_jax.monitor(tx), tree("nine of 2^28", dtype))
    assert not list(indices.too_far(program))


def test_the_proof_sees_what_is_too_far():
    x, i = STRUCT((2000,), jnp.bfloat16), STRUCT((), jnp.int32)
    count = lambda x: jnp.sum((x > 0).astype(int))
    for step in (
        lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 2),
        lambda x, i: jax.lax.fori_loop(0, 2, lambda _, x: x.at[i].add(1), x),
        lambda x, i: jax.lax.cond(i > 0, lambda: count(x), lambda: i),
    ):
        program = jax.make_jaxpr(step)(x, i).jaxpr
        assert not list(indices.too_far(program, reach=2000))
        assert len(list(indices.too_far(program, reach=1999))) == 1


@pytest.fixture
def short_indices(monkeypatch):
    """Let an index reach across 1,000 entries."""
    monkeypatch.setattr(numerics, "_INDEXED", 1000)


SIZES = (1, 127, 999, 1000, 1001, 2500, 300)
RUN = {
    "identity": {},
    "blocks of 8": {"block_size": 8, "density": 1 / 8},
    "blocks of 96": {"block_size": 96, "density": 3 / 96},
    "blocks of 300": {"block_size": 300, "density": 4 / 300},
    "words": {"block_size": 700, "density": 0.02, "value_dtype": jnp.bfloat16},
}


def steps(name, error_dtype, count=6):
    """Return the updates of some steps, of a new trace."""
    given = dict(RUN[name])
    compressor = efcp_jax.identity()
    if given:
        compressor = efcp_jax.top_k(given.pop("density"), **given)
    tx = efcp_jax.scale_by_mfac(M, 0.1, compressor=compressor, error_dtype=error_dtype)
    params = [jnp.zeros(n) for n in SIZES]
    state, found = tx.init(params), []
    update = jax.jit(lambda g, s: tx.update(g, s))
    for i in range(count):
        keys = jax.random.split(jax.random.key(i), len(SIZES))
        draw = lambda key, n: jax.random.normal(key, (n,))
        gradient = [draw(*each) for each in zip(keys, SIZES, strict=True)]
        updates, state = update(gradient, state)
        found.append(np.concatenate(updates))
    return np.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize("error_dtype", [None, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("name", RUN)
def test_steps_in_reach_of_short_indices_are_those_of_long_ones(
    name, error_dtype, monkeypatch
):
    expected = steps(name, error_dtype)
    monkeypatch.setattr(numerics, "_INDEXED", 1000)
    actual = steps(name, error_dtype)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_one_block_is_as_many_equal_ones_as_indices_need(short_indices):
    tx = efcp_jax.scale_by_mfac(M, 0.1, compressor=efcp_jax.top_k(0.01))
    state = tx.init(jnp.zeros(2500))
    blocks, size = state.error.shape
    assert (blocks, size) == (3, 834)
    update, state = jax.jit(tx.update)(jnp.arange(2500.0), state)
    assert np.all(np.isfinite(update))
    # The last of each block are the largest.
    kept = np.flatnonzero(np.asarray(update))
    np.testing.assert_array_equal(np.unique(kept // size), [0, 1, 2])


@pytest.mark.parametrize("module", [cpu, gpu, tpu])
@pytest.mark.parametrize("words", [False, True])
def test_passes_of_every_platform_over_large_blocks(module, words, short_indices):
    size, kept, blocks = 300, 5, 7
    dtype = jnp.dtype(jnp.bfloat16 if words else jnp.float32)
    form = Form(size, kept, Storage.of(dtype, 2**16 if words else size))
    rng = np.random.default_rng(0)
    draw = lambda n: np.sort(
        np.stack([rng.permutation(size)[:n] for _ in range(blocks)]), axis=1
    )
    offsets = np.concatenate([draw(kept) for _ in range(M)], axis=1)
    values = rng.standard_normal(offsets.shape)
    window = form.storage.store(jnp.asarray(values, jnp.float32), jnp.asarray(offsets))
    row = SparseRow(
        jnp.asarray(rng.standard_normal((blocks, kept)), jnp.float32),
        jnp.asarray(draw(kept), jnp.uint32),
    )
    weights = jnp.asarray(rng.standard_normal(M), jnp.float32)
    runs = ((1000, 500), (600,))
    call = lambda function, *args, **static: jax.jit(
        functools.partial(function, form, **static)
    )(*args)
    np.testing.assert_allclose(
        call(module.inner, window, row),
        call(reference.inner, window, row),
        rtol=1e-5,
        atol=1e-5,
    )
    for actual, expected in zip(
        call(module.combine, window, weights, runs=runs),
        call(reference.combine, window, weights, runs=runs),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

"""What runs on accelerators, run on the CPU: whole steps agree with those of CPUs."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import tile_cases

import efcp_jax
from efcp_jax.passes import selection


WINDOW = 5
STEPS = 2 * WINDOW + 1
SKIPPED = 7

# More than 128 blocks of 8 entries, the last of them cut.
SHAPES = {"bias": (7,), "kernel": (3, 10, 17), "weight": (24, 40)}

COMPRESSORS = {
    "identity": efcp_jax.identity(),
    "identity-bf16": efcp_jax.identity(value_dtype=jnp.bfloat16),
    "top_k": efcp_jax.top_k(0.1),
    "top_k-words": efcp_jax.top_k(0.1, block_size=300, value_dtype=jnp.bfloat16),
    "top_k-few-blocks": efcp_jax.top_k(0.2, block_size=100),
    "top_k-tiles": efcp_jax.top_k(0.1, block_size=8),
    "top_k-tiles-bf16": efcp_jax.top_k(0.25, block_size=8, value_dtype=jnp.bfloat16),
    "top_k-tiles-f16": efcp_jax.top_k(0.4, block_size=8, value_dtype=jnp.float16),
    "top_k-tiles-int8": efcp_jax.top_k(0.25, block_size=8, value_dtype=jnp.int8),
    "top_k-tiles-f8": efcp_jax.top_k(0.4, block_size=8, value_dtype=jnp.float8_e4m3fn),
    "low_rank": efcp_jax.low_rank(2),
}
METHODS = {
    "mfac": functools.partial(efcp_jax.scale_by_mfac, WINDOW, 0.1),
    "ggt": functools.partial(efcp_jax.scale_by_ggt, WINDOW, 0.01),
}
ALL = {"feed", "inner", "combine"}
KERNELS = {
    ("tpu", "top_k-tiles"): ALL,
    ("tpu", "top_k-tiles-bf16"): ALL,
    ("tpu", "top_k-tiles-int8"): ALL,
    ("tpu", "top_k-tiles-f8"): ALL,
}
# Method, compressor and whether steps are skipped.
RUNS = [
    *[("mfac", name, True) for name in COMPRESSORS],
    *[("mfac", name, False) for name in ("identity", "top_k", "top_k-tiles-bf16")],
    *[("ggt", name, True) for name in ("identity", "top_k", "low_rank")],
    ("ggt", "top_k-tiles-bf16", True),
]


def run(method, name, skip):
    rng = np.random.default_rng(0)
    model = {key: jnp.zeros(shape, jnp.float32) for key, shape in SHAPES.items()}
    stacked = {
        key: rng.normal(size=(STEPS, *shape)).astype(np.float32)
        for key, shape in SHAPES.items()
    }
    if skip:  # else NaN spreads, and how far depends on the form of the sums
        for gradient in stacked.values():
            gradient[SKIPPED].flat[0] = np.nan
    tx = METHODS[method](compressor=COMPRESSORS[name], skip_nonfinite=skip)

    @jax.jit
    def steps(state, stacked):
        def step(state, gradient):
            update, state = tx.update(gradient, state, model)
            return state, update

        return lax.scan(step, state, stacked)

    return steps(tx.init(model), stacked)


# Traced here, before the branches of another platform are taken.
on_cpu = functools.cache(run)


def assert_close(there, here):
    """Assert that arrays agree next to the largest entry of each."""

    def check(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        scale = np.max(np.abs(b), initial=0)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale)

    jax.tree.map(check, there, here)


@pytest.mark.parametrize("platform", ["default", "tpu", "cuda"])
@pytest.mark.parametrize(("method", "name", "skip"), RUNS)
def test_steps_of_accelerators_are_those_of_cpus(method, name, skip, platform, pretend):
    here = on_cpu(method, name, skip)
    offered, kernels = pretend(platform)
    there = run(method, name, skip)
    assert ["cpu"] in offered
    assert kernels == KERNELS.get((platform, name), set())
    assert_close(there, here)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("name", [name for name in COMPRESSORS if "tiles" in name])
def test_kernels_of_float32_run_where_64_bits_are_on(name, platform, pretend):
    here = on_cpu("mfac", name, True)
    _, kernels = pretend(platform)
    with jax.enable_x64(True):
        there = run("mfac", name, True)
    assert kernels == KERNELS.get((platform, name), set())
    assert_close(there, here)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["top_k-tiles", "top_k-tiles-f16", "top_k-tiles-f8", "top_k"]
)
def test_a_batch_of_models_takes_the_steps_of_each(name):
    """With the branches of all platforms traced, kernels included."""
    tx = efcp_jax.scale_by_mfac(WINDOW, 0.1, compressor=COMPRESSORS[name])
    models = jnp.zeros((2, 1500))
    gradients = jax.random.normal(jax.random.key(0), models.shape)
    update = jax.jit(jax.vmap(tx.update))
    together, state = update(gradients, jax.vmap(tx.init)(models), models)
    together, _ = update(gradients[::-1], state, models)
    for i in range(2):
        _, state = jax.jit(tx.update)(gradients[i], tx.init(models[i]), models[i])
        alone, _ = jax.jit(tx.update)(gradients[1 - i], state, models[i])
        assert_close(together[i], alone)


@pytest.mark.parametrize("platform", ["default", "tpu"])
def test_accelerators_select_the_same_of_many(platform, pretend):
    offered, _ = pretend(platform)
    x = np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)
    x[1] = np.round(x[1])
    x[2, ::50] = -np.inf
    x[2, 7] = np.nan
    x[3] = 0
    got = jax.jit(selection.largest, static_argnums=1)(jnp.asarray(x), 10)
    np.testing.assert_array_equal(got, tile_cases.largest(x, 10))
    assert offered == [["tpu"], *[["cpu"]] * (2 if platform == "default" else 0)]

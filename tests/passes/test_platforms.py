"""What runs on accelerators, run on the CPU: both ways to do a step agree."""

import cases
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import efcp_jax
from efcp_jax.passes import bisection


STEPS = 2 * cases.WINDOW + 1
COMPRESSORS = {
    "identity": efcp_jax.identity(),
    "identity-bf16": efcp_jax.identity(value_dtype=jnp.bfloat16),
    "top_k": efcp_jax.top_k(0.1),
    # Blocks that leaves share, and several of them.
    "top_k-blocks-bf16": efcp_jax.top_k(0.2, block_size=5, value_dtype=jnp.bfloat16),
    "top_k-words": cases.COMPRESSORS["top_k-words-bf16"],
    "low_rank": efcp_jax.low_rank(2),
}


def run(tx):
    model, stacked = cases.params(), cases.gradients(STEPS)
    # One step is to be skipped.
    stacked = jax.tree.map(lambda g: g.at[3].set(jnp.nan), stacked)

    @jax.jit
    def steps(state, stacked):
        def step(state, gradient):
            update, state = tx.update(gradient, state, model)
            return state, update

        return lax.scan(step, state, stacked)

    return steps(tx.init(model), stacked)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("skip", [True, False], ids=["skip", "no_skip"])
def test_steps_of_accelerators_are_those_of_cpus(name, skip, request):
    tx = efcp_jax.scale_by_mfac(
        cases.WINDOW,
        compressor=COMPRESSORS[name],
        skip_nonfinite=skip,
    )
    here = run(tx)
    taken = request.getfixturevalue("accelerator")
    there = run(tx)
    assert ["cpu"] in taken
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            *(np.asarray(x, np.float64) for x in (a, b)), rtol=1e-5, atol=1e-6
        ),
        here,
        there,
    )


def test_search_for_a_threshold_to_the_last_bit_selects_the_same(accelerator):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1000)), jnp.float32)
    got = jax.jit(bisection.largest, static_argnums=1)(x, 10)
    wanted = np.sort(lax.top_k(jnp.abs(x), 10)[1], axis=1)
    np.testing.assert_array_equal(got, wanted)
    assert accelerator == [["cpu"], ["cpu"]]

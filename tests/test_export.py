"""The step lowers for every platform; no accelerator is needed to see it."""

import aliases
import jax
from jax import export
import pytest


@pytest.mark.parametrize("name", aliases.STRUCTURE)
def test_the_step_lowers_for_cpu_cuda_and_tpu(name):
    tx, params = aliases.make(name), aliases.params()
    state = jax.eval_shape(tx.init, params)
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(jax.jit(tx.update), platforms=platforms)(
        params, state, params
    )
    assert exported.platforms == platforms
    updates, new_state = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    shape_and_dtype = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shape_and_dtype(updates) == shape_and_dtype(params)
    assert shape_and_dtype(new_state) == shape_and_dtype(state)

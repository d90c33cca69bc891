"""The step lowers for every platform; no accelerator is needed to see it."""

import math
import re

import aliases
import jax
from jax import export
import jax.numpy as jnp
import pytest

import efcp_jax


@pytest.mark.parametrize("name", aliases.ALL)
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


def test_sparse_steps_of_gpus_sort_nothing_of_the_size_of_the_model():
    """With a window that keeps its factorisation on CPUs, and entries in words."""
    tx = efcp_jax.sparse_mfac(
        1e-3, window_size=512, block_size=4096, value_dtype=jnp.bfloat16
    )
    params = jax.ShapeDtypeStruct((100, 100), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    exported = export.export(jax.jit(tx.update), platforms=["cuda"])
    text = exported(params, state, params).mlir_module()
    assert "stablehlo.scatter" in text
    operands = re.findall(r'"stablehlo.sort".*?\}\) : \((.*?)\) ->', text, re.DOTALL)
    assert len(operands) == text.count('"stablehlo.sort"')
    # Remedies for singular matrices sort what has 512 entries.
    for types in operands:
        shapes = re.findall(r"tensor<((?:\d+x)+)", types)
        assert shapes
        for shape in shapes:
            assert math.prod(map(int, shape.strip("x").split("x"))) < 4096

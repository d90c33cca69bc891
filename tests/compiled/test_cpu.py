"""The program of a model of hundreds of leaves, for the CPU that is here."""

import compiling
import jax
import jax.numpy as jnp
import pytest

from efcp_jax.preconditioners import system as systems


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse-1/128-m64", "low-rank-4-m64"])
def test_program_is_no_larger_than_that_of_adamw(name):
    result = compiling.measure("cpu", f"{name}-transformer")
    adamw = compiling.measure("cpu", "adamw-transformer")
    assert result["lowered_lines"] < adamw["lowered_lines"]
    assert result["instructions"] < adamw["instructions"]
    assert result["temporary_bytes"] < 0.5 * result["state_bytes"]
    assert result["sorts"] == 0


@pytest.mark.slow
def test_default_is_a_program_of_kinds_of_leaves():
    result = compiling.measure("cpu", "sparse_ggt-transformer")
    assert compiling.over(result, {"percent": 25, "kernels": 1000}) == {}


@pytest.mark.slow
def test_kinds_of_leaves_with_gram_matrices_of_their_own_follow_each_other():
    result = compiling.measure("cpu", "by-leaf-2/128-m64-transformer")
    assert compiling.over(result, {"percent": 60, "kernels": 1100}) == {}


def test_remedy_for_singular_systems_holds_a_basis_its_products_and_one_more():
    size = 1024
    vector, scalar = (jax.ShapeDtypeStruct(x, jnp.float32) for x in ((size,), ()))
    gram = jax.ShapeDtypeStruct((size**2,), jnp.float32)
    system = systems.System(gram, vector, scalar)
    made = jax.jit(systems.in_basis).lower(system, vector, vector, scalar).compile()
    assert made.memory_analysis().temp_size_in_bytes < 3.5 * 4 * size**2

"""Workloads of many decades: their equations, their errors, and what solves them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest


SOLUTIONS = {
    "poisson": lambda x: jnp.sin(2 * jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1]),
    "ripples": lambda x: sum(
        jnp.sin(2 * jnp.pi * f * x[0] + f) / f for f in (1.0, 3.0, 8.0)
    ),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_has_no_residuals(load, name):
    with jax.enable_x64(True):
        problem = load("lab.fields").PROBLEMS[name]()
        data = jax.tree.map(jnp.asarray, problem.data)
        for scale, length in ((1.0, 0.0), (2.0, 1.0)):
            field = lambda x, scale=scale: scale * SOLUTIONS[name](x)
            first, *edge = problem.residuals(field, data)
            expected = length * problem.data["values"]
            # Twice the solution misses the right-hand side by the solution.
            np.testing.assert_allclose(np.abs(first), np.abs(expected), atol=1e-12)
            for each in edge:
                np.testing.assert_allclose(each, 0, atol=1e-12)
        solved = jax.vmap(SOLUTIONS[name])(jnp.asarray(problem.tests))
        np.testing.assert_allclose(solved, problem.solution, atol=1e-12)


def test_a_field_of_zeros_has_an_error_of_one(load):
    workload = load("lab.fields").workload("ripples", 4, 2, "float32")
    params, _ = workload.init(jax.random.key(0))
    params = jax.tree.map(jnp.zeros_like, params)
    sums = workload.evaluate(params, (), workload.data, 0)
    assert sums["error"] == pytest.approx(0.0, abs=1e-5)
    power = sum(0.5 / f**2 for f in (1, 3, 8))
    assert sums["loss"] == pytest.approx(np.log10(power), abs=0.02)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_line_search_goes_down_by_decades(load, tmp_path, dtype):
    load("physics").main(
        ["--problem", "ripples", "--width", "8", "--dtype", dtype, "--steps", "60",
         "--seeds", "1", "--optimizers", "lbfgs", "--output", str(tmp_path)]
    )  # fmt: skip
    (run,) = json.loads((tmp_path / "physics.json").read_text()).values()
    assert run["loss"] < -1.5
    assert run["error"] < -0.5
    assert run["curve"]["loss"][-1] == run["loss"]
    # Ten pairs of steps and gradients, and a few vectors.
    assert 20 < run["bytes_per_parameter"] / jnp.dtype(dtype).itemsize < 26
    assert not jax.config.jax_enable_x64

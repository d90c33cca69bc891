"""Losses of many decades: a network as the solution of an equation, and as a function.

Every step sees all points, so the loss is a function of the parameters alone.
"""

from collections.abc import Callable
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lab.workload import Workload


Field = Callable[[jax.Array], jax.Array]  # from a point to a number


class Problem(NamedTuple):
    """What a network shall be.

    Attributes:
        data: Arrays of points, and what belongs to them.
        residuals: From a field and the data to arrays whose mean squares are the loss.
        tests: Points `(tests, axes)` that the error is taken on.
        solution: The field at those points.
        activation: Of the network.
        frequency: What the first layer's weights are multiplied by.
    """

    data: dict[str, np.ndarray]
    residuals: Callable[[Field, dict[str, jax.Array]], list[jax.Array]]
    tests: np.ndarray
    solution: np.ndarray
    activation: Callable[[jax.Array], jax.Array]
    frequency: float


def poisson(inside: int = 400, edge: int = 80) -> Problem:
    """Return Poisson's equation on a square, whose solution is sin(2 pi x) sin(pi y).

    The field is 0 on the edge, and its Laplacian is divided by the eigenvalue 5 pi^2 of
    the solution, so that both terms of the loss are of one size.
    """
    rng = np.random.default_rng(0)
    solve = lambda p: np.sin(2 * np.pi * p[:, 0]) * np.sin(np.pi * p[:, 1])
    points = rng.uniform(size=(inside, 2))
    border = rng.uniform(size=(edge, 2))
    border[np.arange(edge), np.arange(edge) % 2] = np.arange(edge) // 2 % 2

    def residuals(field, data):
        laplacian = jax.vmap(lambda x: jnp.trace(jax.hessian(field)(x)))
        equation = laplacian(data["points"]) / (5 * np.pi**2) + data["values"]
        return [equation, jax.vmap(field)(data["edge"])]

    axis = np.linspace(0, 1, 41)
    tests = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    data = {"points": points, "values": solve(points), "edge": border}
    return Problem(data, residuals, tests, solve(tests), jnp.tanh, 2.0)


def ripples(points: int = 256) -> Problem:
    """Return a sum of sines of 1, 3 and 8 waves on a line, by a network of sines.

    References:
        Sitzmann et al., Implicit Neural Representations with Periodic Activation
        Functions, 2020
    """
    waves = np.array([1, 3, 8])
    solve = lambda x: (np.sin(2 * np.pi * waves * x + waves) / waves).sum(axis=1)
    x = np.linspace(0, 1, points)[:, None]
    between = (x[1:] + x[:-1]) / 2

    def residuals(field, data):
        return [jax.vmap(field)(data["points"]) - data["values"]]

    data = {"points": x, "values": solve(x)}
    return Problem(data, residuals, between, solve(between), jnp.sin, 20.0)


PROBLEMS = {"poisson": poisson, "ripples": ripples}


def workload(name: str, width: int, layers: int, dtype: str) -> Workload:
    """Return the workload of a problem; its losses and errors are logarithms, base 10.

    The error is the relative L2 error, the length of the difference from the solution
    over that of the solution, at points that are not trained on.

    Args:
        name: Of the problem.
        width: Features of a hidden layer.
        layers: Hidden layers.
        dtype: Of parameters and points; float64 needs `jax.enable_x64`.
    """
    problem = PROBLEMS[name]()
    cast = lambda x: jnp.asarray(x, dtype)
    objective, evaluate = _functions(problem)
    arrays = {**problem.data, "tests": problem.tests, "solution": problem.solution}
    axes = problem.tests.shape[1]
    start = lambda key: _start(key, axes, width, layers, problem.frequency)
    return Workload(
        name="physics",
        config={
            **{"problem": name, "width": width, "layers": layers, "dtype": dtype},
            "unit": "log10",
        },
        data=jax.tree.map(cast, arrays),
        init=lambda key: (jax.tree.map(cast, start(key)), ()),
        batches=lambda rng: itertools.repeat(np.int32(0)),
        batch=lambda data, item, key: data,
        loss=lambda params, statistics, data: (objective(params, data), statistics),
        evaluations=lambda: [np.int32(0)],
        evaluate=evaluate,
        per_epoch=1,
    )


def _functions(problem: Problem):
    """Return the loss of parameters and data, and what is told of them."""
    apply = _network(problem.activation)

    def objective(params, data):
        field = lambda x: apply(params, x)
        return jnp.sum(
            jnp.array([(r**2).mean() for r in problem.residuals(field, data)])
        )

    def evaluate(params, statistics, data, item):
        del statistics, item
        found = jax.vmap(lambda x: apply(params, x))(data["tests"])
        error = jnp.linalg.norm(found - data["solution"])
        return {
            "count": jnp.ones(()),
            "loss": jnp.log10(objective(params, data)),
            "error": jnp.log10(error / jnp.linalg.norm(data["solution"])),
        }

    return objective, evaluate


def _start(key, axes, width, layers, frequency) -> dict[str, Any]:
    """Return parameters: normal weights of variance one over the inputs."""
    names = ["embed", *(f"layer{i}" for i in range(1, layers)), "head"]
    sizes = [axes, *[width] * layers, 1]
    params = {}
    for i, name in enumerate(names):
        key, one, two = jax.random.split(key, 3)
        scale = (frequency if not i else 1.0) / sizes[i] ** 0.5
        kernel = scale * jax.random.normal(one, (sizes[i], sizes[i + 1]))
        bias = jax.random.uniform(two, (sizes[i + 1],), minval=-1.0)
        params[name] = {"kernel": kernel, "bias": bias * (i < layers)}
    return params


def _network(activation):
    """Return the function from parameters and a point to a number."""

    def apply(params, x):
        *hidden, head = [params[name] for name in sorted(params, key=_order)]
        for layer in hidden:
            x = activation(x @ layer["kernel"] + layer["bias"])
        return (x @ head["kernel"] + head["bias"])[0]

    return apply


def _order(name):
    return (name != "embed") + 2 * (name == "head"), len(name), name

"""Optimistix: a minimiser that calls the optimizer until it has converged."""

import client_task
import optimistix as optx


def test_the_minimiser_comes_down(name):
    params = client_task.params()
    solver = optx.OptaxMinimiser(client_task.make(name), rtol=1e-6, atol=1e-6)
    solution = optx.minimise(
        lambda params, args: client_task.loss(params),
        solver,
        params,
        max_steps=client_task.STEPS,
        throw=False,
    )
    client_task.falls([client_task.loss(params), client_task.loss(solution.value)])

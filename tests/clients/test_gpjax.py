"""GPJax: the hyperparameters of a Gaussian process."""

import inspect

import client_task
import gpjax as gpx
import jax.numpy as jnp
import numpy as np


POINTS = 24
LENGTHSCALE, VARIANCE, NOISE = 0.5, 4.0, 0.1


def draw():
    """Return points of a process, and the loss at the hyperparameters it has.

    That is the negative logarithm of the density of the points.
    """
    x = np.linspace(0.0, 6.0, POINTS)[:, None]
    kernel = VARIANCE * np.exp(-0.5 * ((x - x.T) / LENGTHSCALE) ** 2)
    root = np.linalg.cholesky(kernel + NOISE**2 * np.eye(POINTS))
    white = np.random.default_rng(0).normal(size=(POINTS, 1))
    density = -0.5 * np.sum(white**2) - np.sum(np.log(np.diag(root)))
    density -= 0.5 * POINTS * np.log(2 * np.pi)
    return x, root @ white, -density


def likelihood():
    gaussian = gpx.likelihoods.Gaussian
    # Versions below 0.14 want to know how many there are.
    if "num_datapoints" in inspect.signature(gaussian.__init__).parameters:
        return gaussian(num_datapoints=POINTS)
    return gaussian()


def test_fit_finds_hyperparameters_as_likely_as_the_true_ones(name, x64):
    x, y, floor = draw()
    prior = gpx.gps.Prior(
        mean_function=gpx.mean_functions.Constant(), kernel=gpx.kernels.RBF()
    )
    _, losses = gpx.fit(
        model=prior * likelihood(),
        objective=lambda model, data: -gpx.objectives.conjugate_mll(model, data),
        train_data=gpx.Dataset(jnp.asarray(x), jnp.asarray(y)),
        optim=client_task.make(name),
        num_iters=client_task.STEPS,
        verbose=False,
    )
    client_task.falls(losses, floor=floor)

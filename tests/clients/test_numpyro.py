"""NumPyro: stochastic variational inference of a linear regression."""

import client_task
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist, infer


WEIGHTS = np.asarray([1.0, -0.5, 0.25, 0.75], np.float32)
NOISE = 0.5


def data():
    x, _ = client_task.data()
    noise = np.random.default_rng(2).normal(size=len(x))
    return x, x @ WEIGHTS + jnp.asarray(NOISE * noise, jnp.float32)


def model(x, y):
    normal = dist.Normal(jnp.zeros(x.shape[1]), 3.0).to_event(1)
    weights = numpyro.sample("weights", normal)
    with numpyro.plate("points", len(x)):
        numpyro.sample("y", dist.Normal(x @ weights, NOISE), obs=y)


def guide(x, y):
    """Return a normal distribution with a mean and a scale for each weight."""
    zeros = jnp.zeros(x.shape[1])
    mean = numpyro.param("mean", zeros)
    scale = numpyro.param("scale", 0.1 + zeros, constraint=dist.constraints.positive)
    numpyro.sample("weights", dist.Normal(mean, scale).to_event(1))


def evidence():
    """Return the negative logarithm of the evidence, a bound of mean losses."""
    x, y = map(np.float64, data())
    covariance = NOISE**2 * np.eye(len(x)) + 9 * x @ x.T
    sign, determinant = np.linalg.slogdet(2 * np.pi * covariance)
    assert sign == 1
    return (determinant + y @ np.linalg.solve(covariance, y)) / 2


def test_svi_comes_near_to_the_evidence(name):
    # What SVI is given it wraps by `optim.optax_to_numpyro`.
    svi = infer.SVI(model, guide, client_task.make(name), infer.Trace_ELBO(8))
    result = svi.run(jax.random.key(0), client_task.STEPS, *data(), progress_bar=False)
    client_task.falls(result.losses, floor=evidence())

"""States saved by version 0.1.0 are restored, and training goes on."""

import pathlib

import jax
import numpy as np
import old_runs
import orbax.checkpoint as ocp
import pytest


SAVED = pathlib.Path(__file__).parent / "version_0_1_0"


@pytest.fixture(scope="module")
def saved():
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(name):
        tx, params = old_runs.RUNS[name], old_runs.params()
        tree = {"state": jax.eval_shape(tx.init, params), "updates": params}
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), tree
        )

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(SAVED, {n: abstract(n) for n in old_runs.RUNS})


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_training_goes_on_from_a_state_of_version_0_1_0(name, saved):
    tx, expected = old_runs.RUNS[name], saved[name]["updates"]
    gradient = old_runs.gradient(old_runs.STEPS)
    updates, _ = jax.jit(tx.update)(gradient, saved[name]["state"], old_runs.params())
    for key, update in updates.items():
        scale = np.max(np.abs(expected[key]))
        np.testing.assert_allclose(update, expected[key], rtol=0, atol=1e-5 * scale)

"""States saved by version 0.1.0 are restored, and training goes on."""

import pathlib

import jax
import numpy as np
import old_runs
import orbax.checkpoint as ocp
import pytest

import efcp_jax


SAVED = pathlib.Path(__file__).parent / "version_0_1_0"


@pytest.fixture(scope="module")
def saved():
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(SAVED).item_metadata.tree
        like = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=on_device),
            metadata,
        )
        return checkpointer.restore(SAVED, like)


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_training_goes_on_from_a_state_of_version_0_1_0(name, saved):
    tx, expected = old_runs.RUNS[name], saved[name]["updates"]
    params = old_runs.params()
    state = efcp_jax.sharding.upgrade_state(saved[name]["state"], tx, params)
    like = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    gradient = old_runs.gradient(old_runs.STEPS)
    updates, _ = jax.jit(tx.update)(gradient, state, params)
    for key, update in updates.items():
        scale = np.max(np.abs(expected[key]))
        np.testing.assert_allclose(update, expected[key], rtol=0, atol=1e-5 * scale)


def test_a_state_that_lacks_a_part_is_refused(saved):
    tx = old_runs.RUNS["dense"]
    state = [dict(saved["dense"]["state"][0]), *saved["dense"]["state"][1:]]
    del state[0]["gram"]
    with pytest.raises(ValueError, match="no 'gram'"):
        efcp_jax.sharding.upgrade_state(state, tx, old_runs.params())

"""A run resumed from a checkpoint is, bit by bit, the run that never stopped."""

import aliases
import flax.serialization
import jax
import optax
import orbax.checkpoint as ocp
import pytest


def through_orbax(carry, abstract, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", carry)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", abstract)


def through_bytes(carry, abstract, path):
    (path / "checkpoint").write_bytes(flax.serialization.to_bytes(carry))
    data = (path / "checkpoint").read_bytes()
    return flax.serialization.from_bytes(abstract, data)


@pytest.mark.parametrize("through", [through_orbax, through_bytes])
@pytest.mark.parametrize("name", aliases.ALL)
def test_training_resumed_after_the_window_wrapped_is_bitwise_equal(
    name, through, tmp_path
):
    tx, params = aliases.make(name, momentum=0.5), aliases.params()
    gradients = aliases.gradients(params, steps=2 * aliases.STEPS)
    update = jax.jit(tx.update)

    def train(carry, gradients):
        params, state = carry
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    halfway = train((params, tx.init(params)), gradients[: aliases.STEPS])
    assert int(optax.tree.get(halfway, "filled")) == aliases.WINDOW  # has wrapped
    abstract = jax.eval_shape(lambda p: (p, tx.init(p)), params)
    if through is through_orbax:
        on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device),
            abstract,
        )
    restored = through(halfway, abstract, tmp_path)
    aliases.assert_equal(restored, halfway)
    rest = gradients[aliases.STEPS :]
    aliases.assert_equal(train(restored, rest), train(halfway, rest))

"""What of Optax goes around an optimizer, or in front of it, on one small network."""

import client_task
import jax
from jax import lax
import numpy as np
import optax
import pytest

import efcp_jax


# Of wrappers that step less often, or forget the window again and again, more is left.
SLOWER = 0.25


def train(tx, params=None, where=lambda params: params, **extra):
    """Return losses, last parameters and last state of a training in one scan.

    Args:
        tx: The optimizer.
        params: What `init` and `update` are given.
        where: A function from it to the parameters at which gradients are taken.
        **extra: Further arguments of `update`, functions of the loss.
    """
    params = client_task.params() if params is None else params

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(client_task.loss)(where(params))
        arguments = {key: of(loss) for key, of in extra.items()}
        updates, state = tx.update(gradient, state, params, **arguments)
        return (optax.apply_updates(params, updates), state), loss

    run = lambda: lax.scan(step, (params, tx.init(params)), length=client_task.STEPS)
    (params, state), losses = jax.jit(run)()
    return losses, params, state


def test_schedule_free_trains_at_a_constant_learning_rate(name):
    rate = optax.warmup_constant_schedule(0.0, client_task.peak(name), 4)
    tx = optax.contrib.schedule_free(client_task.make(name, rate), rate)
    losses, params, state = train(tx)
    averaged = optax.contrib.schedule_free_eval_params(state, params)
    client_task.falls([losses[0], client_task.loss(averaged)])


def adversary():
    return optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


def test_sam_with_its_steps_inside_of_an_update(name):
    tx = optax.contrib.sam(client_task.make(name), adversary(), opaque_mode=True)
    ascend = jax.grad(lambda params, _: client_task.loss(params))
    losses, _, _ = train(tx, grad_fn=lambda _: ascend)
    client_task.falls(losses)


def test_sam_with_its_steps_one_by_one(name):
    tx = optax.contrib.sam(client_task.make(name), adversary())
    losses, _, _ = train(tx)
    client_task.falls(losses[::2], SLOWER)


@pytest.mark.parametrize("reset_state", [False, True])
def test_lookahead(name, reset_state):
    tx = optax.lookahead(
        client_task.make(name),
        sync_period=5,
        slow_step_size=0.5,
        reset_state=reset_state,
    )
    synced = optax.LookaheadParams.init_synced(client_task.params())
    losses, params, _ = train(tx, synced, lambda params: params.fast)
    client_task.falls([losses[0], client_task.loss(params.slow)], SLOWER)


def test_reduce_on_plateau_lowers_the_learning_rate(name):
    tx = optax.chain(
        client_task.make(name, client_task.peak(name)),
        optax.contrib.reduce_on_plateau(factor=0.5, patience=2),
    )
    losses, _, state = train(tx, value=lambda loss: loss)
    client_task.falls(losses)
    assert state[-1].scale < 1


def test_multi_steps(name):
    tx = optax.MultiSteps(client_task.make(name), every_k_schedule=2)
    losses, _, _ = train(tx)
    client_task.falls(losses, SLOWER)


def test_partition_of_the_parameters_between_two_optimizers(name):
    tx = optax.partition(
        {"first": client_task.make(name), "last": optax.adam(0.01)},
        {"hidden": "first", "output": "last"},
    )
    losses, _, _ = train(tx)
    client_task.falls(losses)


def test_masked_parameters_stay(name):
    tx = optax.chain(
        optax.masked(client_task.make(name), {"hidden": True, "output": False}),
        optax.masked(optax.set_to_zero(), {"hidden": False, "output": True}),
    )
    losses, params, _ = train(tx)
    client_task.falls(losses)
    np.testing.assert_array_equal(params["output"], client_task.params()["output"])


def test_hyperparameters_in_the_state(name):
    alias = optax.inject_hyperparams(
        getattr(efcp_jax, name),
        static_args=("window_size", *client_task.STRUCTURE[name]),
    )
    rate = optax.cosine_decay_schedule(client_task.peak(name), client_task.STEPS)
    tx = alias(rate, window_size=client_task.WINDOW, **client_task.STRUCTURE[name])
    losses, _, state = train(tx)
    client_task.falls(losses)
    assert state.hyperparams["learning_rate"] < client_task.peak(name) / 100


def test_clipped_gradients_that_are_applied_if_finite(name):
    tx = optax.chain(optax.clip_by_global_norm(0.1), client_task.make(name))
    losses, _, _ = train(optax.apply_if_finite(tx, max_consecutive_errors=5))
    client_task.falls(losses)

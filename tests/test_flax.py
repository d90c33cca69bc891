"""The optimizers inside of Flax, and on parameters sharded over a mesh."""

import functools

import aliases
from flax import linen as nn, nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import optax
import pytest


every_alias = pytest.mark.parametrize("name", aliases.STRUCTURE)
SPEC = jax.P("x")
STEPS = 3


def loss(tree):
    return sum(jnp.sum(jnp.square(tree[key] - 1)) for key in ("bias", "kernel"))


def make(name, **given):
    # Devices select entries in their own shards, so that a sparse step on a mesh equals
    # that on one device only where all entries are kept.
    return aliases.make(name, **({"density": 1.0} if "sparse" in name else {}), **given)


@functools.cache
def expected(name):
    """Return the parameters after a few steps without Flax and on one device."""
    tx, params = make(name), aliases.params()
    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get(params)


class Model(nnx.Module):
    def __init__(self, sharding=None):
        for key, value in aliases.params().items():
            if sharding is not None:
                # Flax has had several names for this metadata.
                placed = jax.device_put(value, sharding)
                value = nnx.with_partitioning(lambda x=placed: x, tuple(SPEC))()
            setattr(self, key, nnx.Param(value))


def train(model, tx):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.grad(
            lambda m: loss({"bias": m.bias[...], "kernel": m.kernel[...]})
        )(model)
        optimizer.update(model, gradient)

    for _ in range(STEPS):
        step(model, optimizer)
    return {"bias": model.bias[...], "kernel": model.kernel[...]}


@every_alias
def test_nnx_optimizer_equals_the_plain_loop(name):
    aliases.assert_close(jax.device_get(train(Model(), make(name))), expected(name))


@every_alias
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_nnx_optimizer_with_sharded_params_equals_one_device(name, kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, SPEC)
    given = {"sharding": sharding} if kind is AxisType.Auto else {}
    with jax.set_mesh(mesh):
        result = train(Model(sharding), make(name, **given))
    for leaf in result.values():
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    aliases.assert_close(jax.device_get(result), expected(name), 1e-4)


@every_alias
def test_linen_train_state_equals_the_plain_loop(name):
    state = train_state.TrainState.create(
        apply_fn=loss, params=aliases.params(), tx=make(name)
    )
    step = jax.jit(
        lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params))
    )
    for _ in range(STEPS):
        state = step(state)
    aliases.assert_close(jax.device_get(state.params), expected(name))


@every_alias
def test_partitioned_boxes_come_back_around_the_updates(name):
    tx = make(name)
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, ("x",)), aliases.params())
    state = tx.init(boxed)
    for _ in range(STEPS):
        gradient = jax.grad(lambda boxes: loss(nn.unbox(boxes)))(boxed)
        updates, state = tx.update(gradient, state, boxed)
        assert jax.tree.structure(updates) == jax.tree.structure(boxed)
        boxed = optax.apply_updates(boxed, updates)
    aliases.assert_close(jax.device_get(nn.unbox(boxed)), expected(name))


def explicit_mesh():
    """Return the mesh that `jax.make_mesh` makes by default as of JAX 0.9."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    assert version < (0, 9) or mesh == jax.make_mesh((4,), ("x",))
    return mesh


@every_alias
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("spec", [jax.P("x", None), jax.P(None, "x")], ids=str)
def test_under_explicit_axes_updates_have_the_sharding_of_the_gradient(name, spec, jit):
    mesh, tx = explicit_mesh(), make(name)
    alone = aliases.params()
    with jax.set_mesh(mesh):
        specs = {"bias": jax.P(), "kernel": spec}
        place = lambda tree: {
            key: jax.device_put(leaf, NamedSharding(mesh, specs[key]))
            for key, leaf in tree.items()
        }
        params = place(alone)
        init, update = (jax.jit(tx.init), jax.jit(tx.update)) if jit else tx
        state = init(params)
        for gradient in aliases.gradients(alone, STEPS):
            placed = place(gradient)
            updates, new_state = update(placed, state, params)
            assert aliases.types(updates) == aliases.types(placed)
            assert aliases.types(new_state) == aliases.types(state)
            state = new_state
    one, each = tx.init(alone), aliases.gradients(alone, STEPS)
    for gradient in each:
        result, one = tx.update(gradient, one, alone)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(result))
    aliases.assert_close(jax.device_get(updates), jax.device_get(result), 1e-4)

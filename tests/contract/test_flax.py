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

import efcp_jax


every_alias = pytest.mark.parametrize("name", aliases.STRUCTURE)
SPEC = jax.P("x")
STEPS = 3
BLOCK, TILE = 2, 256


def params(seed=0):
    """Return parameters whose shards on four devices are whole tiles."""
    rng = np.random.default_rng(seed)
    shapes = {"bias": (4 * TILE,), "kernel": (4, TILE)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def loss(tree):
    return sum(jnp.sum(jnp.square(tree[key] - 1)) for key in ("bias", "kernel"))


def make(name, **given):
    if "sparse" in name:
        given["block_size"] = BLOCK
    return aliases.make(name, **given)


@functools.cache
def jitted(name):
    return jax.jit(make(name).update)


@functools.cache
def expected(name, seed=0):
    """Return the parameters after a few steps without Flax and on one device."""
    tree = params(seed)
    state = make(name).init(tree)
    for _ in range(STEPS):
        updates, state = jitted(name)(jax.grad(loss)(tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    return jax.device_get(tree)


class Model(nnx.Module):
    def __init__(self, tree, sharding=None):
        for key, value in tree.items():
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
    aliases.assert_close(
        jax.device_get(train(Model(params()), make(name))), expected(name)
    )


@every_alias
def test_nnx_optimizers_made_by_vmap_and_run_by_scan_equal_the_plain_loop(name):
    @nnx.vmap
    def make_both(tree):
        model = Model(tree)
        return model, nnx.Optimizer(model, make(name), wrt=nnx.Param)

    @nnx.vmap
    def train_both(model, optimizer):
        @nnx.scan(in_axes=nnx.Carry, out_axes=nnx.Carry, length=STEPS)
        def steps(carry):
            model, optimizer = carry
            gradient = nnx.grad(
                lambda m: loss({"bias": m.bias[...], "kernel": m.kernel[...]})
            )(model)
            optimizer.update(model, gradient)
            return model, optimizer

        steps((model, optimizer))

    members = [params(seed) for seed in range(2)]
    model, optimizer = make_both(jax.tree.map(lambda *x: jnp.stack(x), *members))
    nnx.jit(train_both)(model, optimizer)
    for seed in range(2):
        result = {"bias": model.bias[seed], "kernel": model.kernel[seed]}
        aliases.assert_close(jax.device_get(result), expected(name, seed))


@every_alias
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_nnx_optimizer_with_sharded_params_equals_one_device(name, kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, SPEC)
    given = {"sharding": sharding} if kind is AxisType.Auto else {}
    with jax.set_mesh(mesh):
        result = train(Model(params(), sharding), make(name, **given))
    for leaf in result.values():
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    aliases.assert_close(jax.device_get(result), expected(name), 1e-4)


@every_alias
def test_linen_train_state_equals_the_plain_loop(name):
    state = train_state.TrainState.create(apply_fn=loss, params=params(), tx=make(name))
    step = jax.jit(
        lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params))
    )
    for _ in range(STEPS):
        state = step(state)
    aliases.assert_close(jax.device_get(state.params), expected(name))


@every_alias
def test_update_takes_nnx_variables_as_it_takes_their_arrays(name):
    tx, plain = make(name), params()
    boxed = jax.tree.map(nnx.Param, plain)
    state = tx.init(boxed)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(plain))
    (gradient,) = aliases.gradients(plain, 1)
    boxed_gradient = jax.tree.map(nnx.Param, gradient)
    updates, new_state = jitted(name)(boxed_gradient, state, boxed)
    assert jax.tree.structure(updates) == jax.tree.structure(boxed_gradient)
    other, other_state = jitted(name)(gradient, state, plain)
    aliases.assert_close(jax.tree.leaves(updates), jax.tree.leaves(other))
    aliases.assert_close(new_state, other_state)


@every_alias
def test_partitioned_boxes_come_back_around_the_updates(name):
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, ("x",)), params())
    state = make(name).init(boxed)
    for _ in range(STEPS):
        gradient = jax.grad(lambda boxes: loss(nn.unbox(boxes)))(boxed)
        updates, state = jitted(name)(gradient, state, boxed)
        assert jax.tree.structure(updates) == jax.tree.structure(boxed)
        boxed = optax.apply_updates(boxed, updates)
    aliases.assert_close(jax.device_get(nn.unbox(boxed)), expected(name))


def explicit_mesh():
    """Return the mesh that `jax.make_mesh` makes by default."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    assert mesh == jax.make_mesh((4,), ("x",))
    return mesh


SPECS = {
    "rows": {"bias": jax.P(), "kernel": jax.P("x", None)},
    "columns": {"bias": jax.P(), "kernel": jax.P(None, "x")},
}


def place(tree, specs, mesh):
    on = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    return {key: on(leaf, specs[key]) for key, leaf in tree.items()}


@every_alias
@pytest.mark.parametrize("divided", SPECS)
def test_a_state_carries_no_axis_names_of_boxes_and_is_sharded_as_without(
    name, divided
):
    tx, mesh, specs = make(name, momentum=0.5), explicit_mesh(), SPECS[divided]
    with jax.set_mesh(mesh):
        plain = place(params(), specs, mesh)
        boxed = {k: nn.Partitioned(plain[k], tuple(specs[k])) for k in plain}
        own, momentum, *_ = jax.eval_shape(tx.init, boxed)
        # A factor or a row has other axes than the parameter whose names these are.
        named = nn.get_partition_spec(own)
        is_spec = lambda node: isinstance(node, jax.P)
        assert set(jax.tree.leaves(named, is_leaf=is_spec)) == {jax.P()}
        # The momentum is Optax's, which keeps the boxes: its axes are the parameter's.
        assert nn.get_partition_spec(momentum.trace) == specs

        shardings = efcp_jax.sharding.state_shardings(tx, boxed)
        alone = efcp_jax.sharding.state_shardings(tx, plain)
        assert jax.tree.leaves(shardings) == jax.tree.leaves(alone)
        state = jax.jit(tx.init, out_shardings=shardings)(boxed)
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        assert len(sharding.spec) <= leaf.ndim
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    if "low_rank" in name:
        parts = state[0].window.rows.parts
        (kernel,) = (part for shape, part in parts.items() if "x" in shape)
        left, right = (batch.sharding.spec for batch in kernel)
        divided_by_x, whole = jax.P(None, None, ("x",)), jax.P(None, None, None)
        assert (left, right) == (
            (divided_by_x, whole) if divided == "rows" else (whole, divided_by_x)
        )


def in_the_order_of_the_devices(kernel, spec):
    """Return the entries so that each device's are next to each other."""
    if spec == jax.P(None, "x"):
        kernel = kernel.reshape(4, 4, -1).swapaxes(0, 1)
    return kernel


@every_alias
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("divided", SPECS)
def test_under_explicit_axes_updates_have_the_sharding_of_the_gradient(
    name, divided, jit
):
    mesh, tx, specs = explicit_mesh(), make(name), SPECS[divided]
    alone, each = params(), aliases.gradients(params(), STEPS)
    with jax.set_mesh(mesh):
        placed = place(alone, specs, mesh)
        init, update = (jax.jit(tx.init), jitted(name)) if jit else tx
        state = init(placed)
        for gradient in each:
            gradient = place(gradient, specs, mesh)
            updates, new_state = update(gradient, state, placed)
            assert aliases.types(updates) == aliases.types(gradient)
            assert aliases.types(new_state) == aliases.types(state)
            state = new_state

    def reordered(tree):
        # Blocks of entries hold what a device holds, in the order in which it does.
        if "sparse" not in name:
            return tree
        kernel = in_the_order_of_the_devices(tree["kernel"], specs["kernel"])
        return {**tree, "kernel": kernel}

    one = tx.init(reordered(alone))
    for gradient in each:
        result, one = jitted(name)(reordered(gradient), one, reordered(alone))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(result))
    aliases.assert_close(
        reordered(jax.device_get(updates)), jax.device_get(result), 1e-4
    )

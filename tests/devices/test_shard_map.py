"""Inside of `jax.shard_map` with its checks: each device steps by itself."""

import functools

import aliases
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import efcp_jax


DEVICES, STEPS = 4, 5
SHAPES = {"b": (7,), "w": (24, 40)}
COMPRESSORS = {
    "identity": efcp_jax.identity(value_dtype=jnp.bfloat16),
    "top_k": efcp_jax.top_k(0.25),
    "top_k in blocks": efcp_jax.top_k(0.1, block_size=128),
    "low_rank": efcp_jax.low_rank(2),
}
TRANSFORMS = {
    "error_feedback": efcp_jax.error_feedback,
    "8 bits": functools.partial(efcp_jax.error_feedback, error_dtype=jnp.int8),
    "mfac": lambda compressor: efcp_jax.scale_by_mfac(3, compressor=compressor),
    "ggt": lambda compressor: efcp_jax.scale_by_ggt(3, compressor=compressor),
    "by leaf": lambda compressor: efcp_jax.scale_by_mfac(
        3, compressor=compressor, block_diagonal=True
    ),
    "large window": lambda compressor: efcp_jax.scale_by_mfac(
        520, compressor=compressor
    ),
}


def gradients():
    """Return gradients of every device and step, `(devices, steps, ...)`."""
    rng = np.random.default_rng(0)
    shape = DEVICES, STEPS
    return {k: rng.normal(size=shape + s).astype(np.float32) for k, s in SHAPES.items()}


def params():
    return {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def run(tx, params, gradients):
    """Return the updates of all steps, of a state made here."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates

    return lax.scan(step, tx.init(params), gradients)[1]


def mesh_of(kind):
    return jax.make_mesh((DEVICES,), ("d",), (kind,))


def alone(tx, gradients):
    """Return the updates of every device, each computed without the others."""
    step = jax.jit(functools.partial(run, tx, params()))
    each = [step({k: g[i] for k, g in gradients.items()}) for i in range(DEVICES)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *each)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", aliases.ALL)
def test_a_member_a_device_is_as_if_alone(name, kind):
    tx, given, mesh = aliases.make(name), gradients(), mesh_of(kind)

    def member(params, gradients):
        mine = jax.tree.map(lambda x: x[0], (params, gradients))
        return jax.tree.map(lambda x: x[None], run(tx, *mine))

    spread = jax.shard_map(member, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    several = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), params())
    found = jax.jit(spread)(
        *jax.device_put((several, given), NamedSharding(mesh, P("d")))
    )
    aliases.assert_equal(jax.device_get(found), alone(tx, given))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_a_mean_of_what_each_device_makes_of_its_gradient(kind, transform):
    tx, given = TRANSFORMS[transform](COMPRESSORS[kind]), gradients()

    def device(gradients):
        state = tx.init(params())  # the same on all devices; what follows is not
        means = []
        for t in range(STEPS):
            mine = jax.tree.map(lambda x, t=t: x[0, t], gradients)
            updates, state = tx.update(mine, state)
            means.append(lax.pmean(updates, "d"))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *means)

    spread = jax.shard_map(
        device, mesh=mesh_of(AxisType.Auto), in_specs=P("d"), out_specs=P()
    )
    found = jax.jit(spread)(given)
    expected = jax.tree.map(lambda x: x.mean(axis=0), alone(tx, given))
    for name in SHAPES:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5 * scale)

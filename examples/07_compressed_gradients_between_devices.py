"""Each device compresses its own gradient, with its own error, and sends what it kept.

What error feedback was made for: data-parallel training in which devices exchange a
few entries of their gradients. Inside of `jax.shard_map` every device has a state of
its own; values and offsets of all devices are gathered and added up on arrival, and
Adam steps with the mean. Beside it the usual way, the mean of dense gradients.

A device receives 3 bytes, a value and an offset, for every entry that another one kept:
(N - 1) * 3 * d * density from N devices. An all-reduce of float32 sends and receives
about 8 d whatever N is. With 2 of 128 kept the entries are less up to 171 devices;
beyond that, gather within groups of devices and average the groups.

    python examples/07_compressed_gradients_between_devices.py
"""

import functools
from typing import Any

from collectives import collectives
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import optax
import task

import efcp_jax


DEVICES, BLOCK, KEPT = 4, 128, 2

jax.config.update("jax_num_cpu_devices", DEVICES)
mesh = jax.make_mesh((DEVICES,), ("data",), (AxisType.Auto,))
few = efcp_jax.top_k(KEPT / BLOCK, block_size=BLOCK, value_dtype=jnp.bfloat16)
feedback: Any = efcp_jax.error_feedback(few)
adam = optax.adam(task.decay(1e-2))
start, unravel = ravel_pytree(task.init())
start = jnp.pad(start, (0, -len(start) % BLOCK))
parameters = lambda vector: unravel(vector[: len(vector) - padding])
padding = len(start) - sum(leaf.size for leaf in jax.tree.leaves(task.init()))


def mean_of_few(gradient, state):
    """Return the mean of the compressed gradients of all devices, and the new error."""
    compressed, state = feedback.update(gradient, state)
    blocks = compressed.reshape(-1, BLOCK)
    # Of a vector of few entries these are all, so nothing more is lost.
    offsets = jax.lax.top_k(jnp.abs(blocks), KEPT)[1]
    values = jnp.take_along_axis(blocks, offsets, axis=1).astype(jnp.bfloat16)
    # As bits, which no compiler gathers in another dtype.
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16)
    sent = bits, offsets.astype(jnp.uint8)
    gathered = jax.lax.all_gather(sent, "data", axis=1, tiled=True, to="invarying")
    bits, offsets = gathered
    values = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(blocks.dtype)
    rows = jnp.arange(len(blocks))[:, None]
    zeros = jnp.zeros(blocks.shape)
    total = zeros.at[rows, offsets.astype(jnp.int32)].add(values)
    return total.reshape(-1) / DEVICES, state


def mean_of_all(gradient, state):
    """Return the mean of the gradients of all devices."""
    return jax.lax.pmean(gradient, "data"), state


def train(mean, vector, images, labels):
    """Return what a device has trained, its share of every batch at a time."""
    loss = lambda vector, *batch: task.loss_fn(parameters(vector), *batch)
    # Differentiated by a vector that is everywhere the same, a loss is summed over all
    # devices. By one of its own, each has its own gradient.
    own = lambda vector: jax.lax.pcast(vector, "data", to="varying")

    def step(carry, batch):
        vector, error, state = carry
        gradient, error = mean(jax.grad(loss)(own(vector), *batch), error)
        update, state = adam.update(gradient, state, vector)
        return (optax.apply_updates(vector, update), error, state), None

    carry = vector, feedback.init(own(vector)), adam.init(vector)
    return jax.lax.scan(step, carry, (images, labels))[0][0]


images, labels = task.data()
shape = task.STEPS, task.BATCH_SIZE
batches = jax.random.randint(jax.random.key(2), shape, 0, task.TRAINED)
for name, mean in {"entries": mean_of_few, "everything": mean_of_all}.items():
    spread = jax.shard_map(
        functools.partial(train, mean),
        mesh=mesh,
        in_specs=(P(), P(None, "data"), P(None, "data")),
        out_specs=P(),
    )
    program = jax.jit(spread).lower(start, images[batches], labels[batches]).compile()
    trained = program(start, images[batches], labels[batches])
    loss, accuracy = task.held_out(parameters(trained))
    width = {"all-gather": 3 / 2 * (DEVICES - 1) / DEVICES, "all-reduce": 8}
    received = sum(width[kind] * size for kind, size in collectives(program))
    print(
        f"{name:10} sent: loss {loss:.3f}, accuracy {accuracy:.3f},"
        f" {received:.0f} bytes a device and step"
    )

"""Train on many devices: the state is divided among them and hardly anything is sent.

Run it anywhere; without accelerators it forces eight CPU devices:

    python examples/train_sharded.py --parallel fsdp
    python examples/train_sharded.py --parallel tensor --optimizer low_rank_mfac

It prints the bytes that each device holds and the collectives in the compiled update.
"""

import argparse
import functools
import itertools
import math

from collectives import collectives
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax

import efcp_jax


WIDTHS = (256, 512, 512, 32)  # of the layers; all divide among 2, 4, ... 32 devices
BATCH = 512
WINDOW = 32

# The mesh axes `data` and `model`, as shares of all devices, and the partition of the
# matrices and vectors of a layer. Matrices of the tensor-parallel layers are divided by
# columns and by rows in turn.
PARALLEL = {
    "data": ((-1, 1), [(P(), P())] * 3),
    "fsdp": ((-1, 1), [(P("data"), P("data"))] * 3),
    "tensor": (
        (1, -1),
        [
            (P(None, "model"), P("model")),
            (P("model"), P()),
            (P(None, "model"), P("model")),
        ],
    ),
    "fsdp_tensor": ((-1, 2), [(P("data", "model"), P(("data", "model")))] * 3),
}
OPTIMIZERS = {
    "mfac": functools.partial(efcp_jax.mfac, window_size=WINDOW),
    "sparse_mfac": functools.partial(efcp_jax.sparse_mfac, window_size=WINDOW),
    "low_rank_mfac": functools.partial(efcp_jax.low_rank_mfac, window_size=WINDOW),
}


def make_params(generator):
    return [
        {"w": generator.normal(size=(a, b)).astype("f") / a**0.5, "b": np.zeros(b, "f")}
        for a, b in itertools.pairwise(WIDTHS)
    ]


def predict(params, inputs):
    for layer in params[:-1]:
        inputs = jax.nn.relu(inputs @ layer["w"] + layer["b"])
    return inputs @ params[-1]["w"] + params[-1]["b"]


def loss(params, inputs, labels):
    logits = predict(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def bytes_a_device(tree):
    """Return the bytes of `tree` on the first device."""
    first = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parallel", choices=PARALLEL, default="fsdp")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sparse_mfac")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)  # of no effect on accelerators

    shape, partition = PARALLEL[args.parallel]
    count = jax.device_count()
    sizes = tuple(count // abs(math.prod(shape)) if n == -1 else n for n in shape)
    # Auto axes let XLA choose how the model is computed. The optimizer is told where
    # the parameters live; on a mesh of Explicit axes it would read it from their types.
    mesh = jax.make_mesh(sizes, ("data", "model"), (AxisType.Auto,) * 2)
    shardings = [
        {"w": NamedSharding(mesh, w), "b": NamedSharding(mesh, b)} for w, b in partition
    ]
    tx = OPTIMIZERS[args.optimizer](1 / WINDOW, sharding=shardings)

    params = jax.device_put(make_params(np.random.default_rng(0)), shardings)
    where = efcp_jax.sharding.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=where)(params)  # each device its own part
    print(f"{count} devices ({jax.devices()[0].device_kind}), mesh {dict(mesh.shape)}")
    for name, tree in (("parameters", params), ("state", state)):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        print(f"{name}: {whole:,} bytes, {bytes_a_device(tree):,} on each device")

    update = jax.jit(tx.update).lower(params, state, params).compile()
    print("collectives of the update:")
    for kind, size in collectives(update):
        print(f"  {kind} of {size:,} numbers")

    # Donated, the window is written in place instead of being copied every step.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, inputs, labels):
        value, gradient = jax.value_and_grad(loss)(params, inputs, labels)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    # Labels come from another network of the same shape.
    teacher = make_params(np.random.default_rng(1))
    generator, batches = np.random.default_rng(2), NamedSharding(mesh, P("data"))
    answer = jax.jit(lambda inputs: jnp.argmax(predict(teacher, inputs), axis=1))
    for number in range(args.steps):
        inputs = generator.normal(size=(BATCH, WIDTHS[0])).astype("f")
        inputs = jax.device_put(inputs, batches)
        params, state, value = step(params, state, inputs, answer(inputs))
        if number % 20 == 0 or number == args.steps - 1:
            print(f"step {number:4d}  loss {value:.4f}")


if __name__ == "__main__":
    main()

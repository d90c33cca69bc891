"""One of several processes that train together; started by `test_distributed.py`.

Usage: distributed_worker.py ADDRESS PROCESS PROCESSES DEVICES FIRST LAST DIRECTORY

Trains steps FIRST to LAST on DEVICES devices a process. It begins with the checkpoint
of step FIRST in DIRECTORY if FIRST is not 0, whatever number of devices has saved it,
and leaves a checkpoint of step LAST. With ADDRESS "alone" there is one process.
"""

import json
import pathlib
import sys

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp

import efcp_jax
from efcp_jax.devices import placement


SHAPES = {"b": (12,), "w": (24, 12)}
# A sparse window beside replicated parameters, and a low-rank one beside sharded ones.
# Then both ways without being told, where the step divides small trees and large ones.
CASES = {
    "sparse": (
        {"b": P(), "w": P()},
        lambda sharding: efcp_jax.sparse_mfac(
            0.05, 4, 0.25, momentum=0.5, block_size=8, sharding=sharding
        ),
    ),
    "low_rank": (
        {"b": P(), "w": P("x")},
        lambda sharding: efcp_jax.low_rank_ggt(0.05, 4, 2, sharding=sharding),
    ),
    "data_parallel": (
        {"b": P(), "w": P()},
        lambda _: efcp_jax.sparse_mfac(0.05, 4, 0.25, momentum=0.5, block_size=8),
    ),
    "divided": (
        {"b": P(), "w": P(None, "x")},
        lambda _: efcp_jax.mfac(0.05, 4, momentum=0.5),
    ),
}
# Trees of up to so many entries are brought to every device.
UNTOLD = {"data_parallel": 2**20, "divided": 0}


def loss(params, inputs, targets):
    return jnp.mean((jnp.tanh(inputs @ params["w"] + params["b"]) - targets) ** 2)


def setting(case, mesh):
    """Return the optimizer, and parameters without data, on `mesh`."""
    placement.GATHERED = UNTOLD.get(case, 0)
    specs, make = CASES[case]
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
        for name, shape in SHAPES.items()
    }
    return make(shardings), params


def distribute(tree, shardings):
    return jax.tree.map(
        lambda leaf, at: jax.make_array_from_callback(
            leaf.shape, at, lambda index: leaf[index]
        ),
        tree,
        shardings,
    )


def train(case, mesh, first, last, directory):
    """Train on the devices of `mesh`, from a checkpoint unless `first` is 0."""
    tx, model = setting(case, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, model)
    checkpointer = ocp.PyTreeCheckpointer()
    if first == 0:
        generator = np.random.default_rng(0)
        params = {
            name: generator.normal(size=shape).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        params = distribute(params, shardings)
        if case in UNTOLD:
            state = tx.init(params)
        else:
            places = efcp_jax.sharding.state_shardings(tx, model)
            state = jax.jit(tx.init, out_shardings=places)(params)
    else:
        saved = json.loads((directory / f"devices_{first}").read_text())
        old = setting(case, AbstractMesh((saved,), ("x",), (AxisType.Auto,)))
        item = {"params": model, "state": efcp_jax.sharding.abstract_state(*old)}
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item
        )
        restored = checkpointer.restore(
            directory / f"{case}_{first}",
            args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy),
        )
        params = distribute(restored["params"], shardings)
        state = efcp_jax.sharding.reshard_state(restored["state"], old, (tx, model))

    @jax.jit
    def step(params, state, inputs, targets):
        gradient = jax.grad(loss)(params, inputs, targets)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    data = NamedSharding(mesh, P("x"))
    for number in range(first, last):
        generator = np.random.default_rng([1, number])
        batch = (generator.normal(size=(24, 24)), generator.normal(size=(24, 12)))
        batch = [each.astype(np.float32) for each in batch]
        params, state = step(params, state, *distribute(batch, [data, data]))
    target = directory / f"{case}_{last}"
    checkpointer.save(target, {"params": params, "state": state}, force=True)
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(params, tiled=True)
    return jax.device_get(params)


def main():
    address, directory = sys.argv[1], pathlib.Path(sys.argv[7])
    process, processes, devices, first, last = map(int, sys.argv[2:7])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if address != "alone":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            address, processes, process, initialization_timeout=30
        )
    mesh = jax.make_mesh((jax.device_count(),), ("x",), (AxisType.Auto,))
    results = {}
    for case in CASES:
        final = train(case, mesh, first, last, directory)
        results |= {f"{case}.{name}": value for name, value in final.items()}
    if process == 0:
        (directory / f"devices_{last}").write_text(json.dumps(jax.device_count()))
        np.savez(directory / f"final_{last}.npz", **results)


if __name__ == "__main__":
    main()

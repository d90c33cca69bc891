"""Save a Flax training loop with Orbax, restore it, and train on: bit by bit the same.

The state of an optimizer is a tree of arrays of fixed shapes, so it is saved together
with the model, and restored into shapes alone: nothing is trained or allocated before.

    python examples/checkpoint.py
"""

import pathlib
import tempfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import efcp_jax


STEPS = 60
SAVED = 35  # steps before the checkpoint; the window of 16 rows has wrapped twice

inputs = jax.random.normal(jax.random.key(0), (STEPS, 64, 8))
targets = jnp.sin(inputs.sum(-1, keepdims=True))


def make():
    """Return a model and its optimizer at the start of training."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(8, 64, rngs=rngs), nnx.tanh, nnx.Linear(64, 1, rngs=rngs)
    )
    # Updates keep their length as gradients shrink, so the learning rate must fall.
    decay = optax.cosine_decay_schedule(1 / 16, STEPS)
    tx = efcp_jax.sparse_mfac(decay, window_size=16, density=0.1, block_size=64)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, batch):
    def loss_fn(model):
        return jnp.mean(jnp.square(model(batch[0]) - batch[1]))

    loss, gradient = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradient)
    return loss


def train(both, first, last):
    """Train from step `first` up to `last` and return the loss of every step."""
    model, optimizer = both
    batches = [(inputs[t], targets[t]) for t in range(first, last)]
    return [float(step(model, optimizer, batch)) for batch in batches]


def save(both, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.to_pure_dict(nnx.state(both)))


def restore(path):
    """Return the model and the optimizer that were saved."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        nnx.to_pure_dict(abstract),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.replace_by_pure_dict(abstract, checkpointer.restore(path, shapes))
    return nnx.merge(graph, abstract)


whole = make()
losses = train(whole, 0, STEPS)

with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "checkpoint"
    stopped = make()
    train(stopped, 0, SAVED)
    save(stopped, path)
    saved_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    resumed = restore(path)
    resumed_losses = train(resumed, SAVED, STEPS)

pairs = zip(
    jax.tree.leaves(nnx.state(whole)), jax.tree.leaves(nnx.state(resumed)), strict=True
)
same = [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs]
print(f"without a stop:   loss {losses[0]:.4f} -> {losses[-1]:.4f}")
print(f"through the disk: loss {losses[0]:.4f} -> {resumed_losses[-1]:.4f}")
print(f"checkpoint: {saved_bytes:,} bytes")
print(f"arrays equal bit by bit: {sum(same)} of {len(same)}")
print(f"losses after the checkpoint equal: {resumed_losses == losses[SAVED:]}")

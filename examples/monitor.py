"""Watch an optimizer while it trains, and plot what it does.

`efcp_jax.monitor` wraps any optimizer and keeps figures of its last step in the state:
the angle between the gradient and the step taken, their lengths, how differently
coordinates are rescaled, the effective rank of the window and the share of the gradient
that waits in the error. `optax.tree.get` reads them by name.

    python examples/monitor.py --plot monitor.png
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import efcp_jax


STEPS = 400
BATCH_SIZE = 64
HIDDEN = 64
WINDOW = 32
FIGURES = ("angle", "gradient_norm", "update_norm", "effective_rank", "error_ratio")

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--plot", help="file of the figure; none is drawn without it")
plot = arguments.parse_args().plot

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
keys = jax.random.split(jax.random.key(0), 3)
params = {
    "hidden": jax.random.normal(keys[0], (64, HIDDEN)) / 8,
    "output": jax.random.normal(keys[1], (HIDDEN, 10)) / 8,
}
batches = jax.random.randint(keys[2], (STEPS, BATCH_SIZE), 0, len(images))


def loss_fn(params, batch):
    logits = jnp.tanh(images[batch] @ params["hidden"]) @ params["output"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
    return jnp.mean(loss)


def train(tx):
    """Return the loss and the figures of every step, stacked."""

    def step(carry, batch):
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(gradient, state, params)
        figures = {name: optax.tree.get(state, name) for name in FIGURES}
        figures["ratio_quartiles"] = optax.tree.get(state, "ratio_quartiles")
        return (optax.apply_updates(params, updates), state), (loss, figures)

    scan = functools.partial(jax.lax.scan, step)
    return jax.jit(scan)((params, tx.init(params)), batches)[1]


decay = lambda peak: optax.cosine_decay_schedule(peak, STEPS)
optimizers = {
    "AdamW": optax.adamw(decay(8e-3)),
    "sparse GGT": efcp_jax.sparse_ggt(decay(1.0), WINDOW),
    "sparse M-FAC": efcp_jax.sparse_mfac(decay(1 / WINDOW), WINDOW),
}
runs = {name: train(efcp_jax.monitor(tx)) for name, tx in optimizers.items()}
for name, (loss, figures) in runs.items():
    last = {key: jnp.mean(value[-50:], axis=0) for key, value in figures.items()}
    quartiles = " ".join(f"{value:.1e}" for value in last["ratio_quartiles"])
    print(
        f"{name:13} loss {jnp.mean(loss[-50:]):.1e}, in the last 50 steps:"
        f" angle {last['angle']:.0f} degrees,"
        f" quartiles of |u/g| {quartiles},"
        f" effective rank {last['effective_rank']:.1f},"
        f" error ratio {last['error_ratio']:.2f}"
    )

if plot is not None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True)
    for axis, name in zip(axes.flat, ("loss", *FIGURES), strict=True):
        for label, (loss, figures) in runs.items():
            axis.plot(loss if name == "loss" else figures[name], label=label, lw=0.8)
        axis.set_title(name.replace("_", " "))
        axis.set_yscale("log" if name == "loss" or "norm" in name else "linear")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=150)

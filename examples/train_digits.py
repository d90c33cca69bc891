"""Train a small CNN on scikit-learn's handwritten digits with eight optimizers.

All start from the same parameters and see the same batches. The learning rates of
M-FAC (1 / window) and GGT (1) are the library's rule of thumb, AdamW's is the best of
{1, 2, 4, 8, 16} x 1e-3 over three seeds; all decay to zero along a cosine.

    python examples/train_digits.py --optimizers adamw sparse_mfac --epochs 10
"""

import argparse
from pathlib import Path
import time
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import efcp_jax


BATCH_SIZE = 64
ADAMW_LEARNING_RATE = 8e-3

TITLES = {
    "adamw": "AdamW",
    "mfac": "M-FAC, dense",
    "sparse_mfac": "M-FAC, sparse",
    "sparse_mfac_no_feedback": "M-FAC, sparse, no feedback",
    "low_rank_mfac": "M-FAC, low rank",
    "ggt": "GGT, dense",
    "sparse_ggt": "GGT, sparse",
    "low_rank_ggt": "GGT, low rank",
}


def make_optimizer(name: str, steps: int, window: int, density: float, rank: int):
    """Return the optimizer called `name`, its learning rate decaying over `steps`."""
    decay = lambda peak: optax.cosine_decay_schedule(peak, steps)
    mfac_rate, ggt_rate = decay(1 / window), decay(1.0)
    match name:
        case "adamw":
            return optax.adamw(decay(ADAMW_LEARNING_RATE))
        case "mfac":
            return efcp_jax.mfac(mfac_rate, window)
        case "sparse_mfac":
            return efcp_jax.sparse_mfac(mfac_rate, window, density)
        case "sparse_mfac_no_feedback":
            return efcp_jax.sparse_mfac(
                mfac_rate, window, density, error_feedback=False
            )
        case "low_rank_mfac":
            return efcp_jax.low_rank_mfac(mfac_rate, window, rank)
        case "ggt":
            return efcp_jax.ggt(ggt_rate, window)
        case "sparse_ggt":
            return efcp_jax.sparse_ggt(ggt_rate, window, density)
        case "low_rank_ggt":
            return efcp_jax.low_rank_ggt(ggt_rate, window, rank)
    raise ValueError(f"No optimizer is called {name!r}; choose from {list(TITLES)}.")


class CNN(nnx.Module):
    """Two convolutions and two dense layers, 122,250 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(4 * 4 * 64, 100, rngs=rngs)
        self.dense2 = nnx.Linear(100, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images `(batch, 8, 8, 1)` to logits `(batch, 10)`."""
        x = nnx.relu(self.conv1(images))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))
        return self.dense2(x)


class Result(NamedTuple):
    """What a training run is judged by."""

    accuracy: float
    train_loss: float
    bytes_per_parameter: float
    milliseconds: float
    losses: np.ndarray


def load_data(seed: int):
    """Return the digits, cut into training and test set."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    split = train_test_split(images, labels, test_size=0.2, random_state=seed)
    return [jnp.asarray(part) for part in split]


def batches(examples: int, epochs: int, seed: int) -> np.ndarray:
    """Return the examples of every batch of every epoch, `(steps, BATCH_SIZE)`."""
    rng = np.random.default_rng(seed)
    whole = examples // BATCH_SIZE * BATCH_SIZE
    orders = [rng.permutation(examples)[:whole] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, BATCH_SIZE)


def train(tx: optax.GradientTransformation, data, order, seed: int, title: str):
    """Train a fresh model with `tx` and return the `Result`."""
    images, test_images, labels, test_labels = data
    graph, params = nnx.split(CNN(nnx.Rngs(seed)))
    state = tx.init(params)
    bytes_per_parameter = efcp_jax.memory_report(tx, params).per_parameter

    def loss_fn(params, images, labels):
        logits = nnx.merge(graph, params)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), logits

    def step(params, state, index):
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, _), gradients = gradient_fn(params, images[index], labels[index])
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    # Donated, the window is updated in place. Compiled ahead, it is compiled once.
    compiled = jax.jit(step, donate_argnums=(0, 1))
    compiled = compiled.lower(params, state, order[0]).compile()

    losses, seconds = [], []
    progress = tqdm(order, desc=f"{title:27}", unit="step")
    for index in progress:
        start = time.perf_counter()
        params, state, loss = compiled(params, state, index)
        losses.append(float(loss))  # waits for the step
        seconds.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)

    train_loss, _ = jax.jit(loss_fn)(params, images, labels)
    _, logits = jax.jit(loss_fn)(params, test_images, test_labels)
    return Result(
        accuracy=float(jnp.mean(jnp.argmax(logits, axis=-1) == test_labels)),
        train_loss=float(train_loss),
        bytes_per_parameter=bytes_per_parameter,
        milliseconds=1e3 * float(np.median(seconds)),
        losses=np.array(losses),
    )


def report(results: dict[str, Result]) -> None:
    """Print the table."""
    print(
        f"\n{'optimizer':27}{'test accuracy':>14}{'train loss':>12}"
        f"{'state bytes/param':>19}{'ms/step':>9}"
    )
    for name, result in results.items():
        print(
            f"{TITLES[name]:27}{result.accuracy:>14.4f}{result.train_loss:>12.1e}"
            f"{result.bytes_per_parameter:>19.1f}{result.milliseconds:>9.1f}"
        )


def plot(results: dict[str, Result], epochs: int, path: Path) -> None:
    """Draw the loss curves of both families, and the memory of all."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    axes[1].sharey(axes[0])
    for axis, family in zip(axes, ("M-FAC", "GGT"), strict=False):
        for name, result in results.items():
            if name != "adamw" and not TITLES[name].startswith(family):
                continue
            per_epoch = len(result.losses) // epochs
            mean = np.convolve(
                result.losses, np.full(per_epoch, 1 / per_epoch), "valid"
            )
            epoch = 1 + np.arange(len(mean)) / per_epoch
            axis.plot(epoch, mean, color=color(name), label=TITLES[name])
        axis.set(title=family, yscale="log", xlabel="epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="lower left")
    axes[0].set_ylabel("training loss, mean of the last epoch")
    memory = {TITLES[n]: r.bytes_per_parameter for n, r in results.items()}
    bars = axes[2].barh(
        list(memory), list(memory.values()), color=[color(name) for name in results]
    )
    axes[2].bar_label(bars, fmt="%.1f", padding=3)
    axes[2].set(title="Optimizer state", xscale="log", xlabel="bytes a parameter")
    axes[2].set_xlim(1, 3 * max(memory.values()))
    axes[2].invert_yaxis()
    axes[2].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def color(name: str) -> str:
    """Return the same colour for the same representation in both families."""
    if name == "adamw":
        return "black"
    kinds = {"no_feedback": "tab:red", "sparse": "tab:orange", "rank": "tab:green"}
    return next((kinds[kind] for kind in kinds if kind in name), "tab:blue")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizers", nargs="+", choices=TITLES, default=TITLES)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--density", type=float, default=2 / 128)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("out"))
    args = parser.parse_args()

    data = load_data(args.seed)
    order = batches(len(data[0]), args.epochs, args.seed)
    results = {}
    for name in args.optimizers:
        tx = make_optimizer(name, len(order), args.window, args.density, args.rank)
        results[name] = train(tx, data, order, args.seed, TITLES[name])
    report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    plot(results, args.epochs, args.output / "digits.png")
    print(f"\nThe figure is in {args.output / 'digits.png'}")


if __name__ == "__main__":
    main()

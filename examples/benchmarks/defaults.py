"""Evidence for the defaults: the digits CNN, one setting changed at a time.

Prints a row a setting: test accuracy (mean and lowest over the seeds) and the geometric
mean of the final training loss.

    python examples/benchmarks/defaults.py --optimizers sparse_mfac sparse_ggt
"""

import argparse
import os
from pathlib import Path
import sys


os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.append(str(Path(__file__).parents[1]))  # the training loop lives there

import jax.numpy as jnp
import numpy as np
import optax
from train_digits import batches, load_data, train

import efcp_jax


EPOCHS = 15

WINDOWS = [{"window_size": window} for window in (16, 32)]
SPARSE = [
    *({"density": kept / 128} for kept in (1, 8)),
    {"block_size": 1 << 20},  # one block of all parameters
    {"value_dtype": jnp.float32},
    {"value_dtype": jnp.int8},
    {"value_dtype": jnp.float8_e4m3fn},
    {"error_dtype": jnp.float32},
    {"error_dtype": jnp.int8},
    {"error_feedback": False},
]
DIVISOR = [{"divisor": "filled"}]


def common(ridge: str) -> list[dict]:
    """Return the settings of every optimizer whose damping is called `ridge`."""
    relative = [{ridge: 10.0**n, "relative": True} for n in range(1, -6, -1)]
    # As published: in the unit of the gradient, and of the Euclidean metric.
    published = [{ridge: value} for value in (1e-2, 1e-4)]
    return [{}, {"metric": None}, *relative, *published]


SETTINGS = {
    "sparse_mfac": [*common("damping"), *WINDOWS, *DIVISOR, *SPARSE],
    "mfac": common("damping"),
    "low_rank_mfac": common("damping"),
    "sparse_ggt": [*common("eps"), *WINDOWS, *SPARSE],
    "ggt": common("eps"),
    "low_rank_ggt": common("eps"),
}


def measure(name: str, setting: dict, seeds: list[int]) -> str:
    """Train with one setting and return its row of the table."""
    results = []
    for seed in seeds:
        data = load_data(seed)
        order = batches(len(data[0]), EPOCHS, seed)
        peak = 1.0 if "ggt" in name else 1 / setting.get("window_size", 64)
        schedule = optax.cosine_decay_schedule(peak, len(order))
        tx = getattr(efcp_jax, name)(schedule, **setting)
        results.append(train(tx, data, order, seed, name))
    accuracy = np.array([result.accuracy for result in results])
    losses = np.array([result.train_loss for result in results])
    label = ", ".join(
        f"{key}={getattr(value, '__name__', value)}" for key, value in setting.items()
    )
    return (
        f"{label or 'defaults':34}{accuracy.mean():>9.4f}{accuracy.min():>9.4f}"
        f"{np.exp(np.log(losses).mean()):>12.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--optimizers", nargs="+", choices=SETTINGS, default=SETTINGS)
    args = parser.parse_args()
    for name in args.optimizers:
        print(f"\n{name:34}{'accuracy':>9}{'lowest':>9}{'train loss':>12}")
        for setting in SETTINGS[name]:
            print(measure(name, setting, args.seeds), flush=True)


if __name__ == "__main__":
    main()

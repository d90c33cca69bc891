"""A training run that saves as it goes; `test_crash.py` kills it.

Run as `python crash_worker.py FORMAT DIRECTORY [pause]`; `pause` stops in the middle of
the third save until killed.
"""

import os
from pathlib import Path
import sys
import time


sys.path.append(str(Path(__file__).parents[1]))

import conftest as conftest  # the settings of JAX, before it starts
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import efcp_jax


EVERY = 3
SHAPES = {"w": (256, 128), "b": (40,)}
TX = efcp_jax.sparse_mfac(
    optax.linear_schedule(0.1, 0.01, 100),
    window_size=64,
    density=0.2,
    momentum=0.9,
    value_dtype=jnp.bfloat16,
)


def start():
    """Return the parameters, the optimizer state and the number of steps done."""
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    return params, TX.init(params), jnp.zeros((), jnp.int32)


@jax.jit
def advance(carry):
    """Do one step, whose noise depends on the step number alone."""
    params, state, count = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count))
    gradient = {
        name: leaf + jax.random.normal(key, leaf.shape)
        for key, (name, leaf) in zip(keys, params.items(), strict=True)
    }
    updates, state = TX.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, count + 1


def save_flax(directory: Path, carry, between=lambda: None) -> None:
    """Write beside the last checkpoint and put in its place at once."""
    data = flax.serialization.to_bytes(carry)
    beside = directory / "checkpoint.tmp"
    with beside.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        between()
        file.write(data[len(data) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    beside.replace(directory / "checkpoint")


def load_flax(directory: Path):
    """Return the last checkpoint."""
    data = (directory / "checkpoint").read_bytes()
    return flax.serialization.from_bytes(start(), data)


def save_orbax(directory: Path, carry) -> None:
    """Save under the number of steps done."""
    with ocp.CheckpointManager(directory) as manager:
        manager.save(int(carry[2]), args=ocp.args.StandardSave(carry))


def load_orbax(directory: Path):
    """Return the last complete checkpoint."""
    with ocp.CheckpointManager(directory) as manager:
        target = ocp.args.StandardRestore(jax.eval_shape(start))
        return manager.restore(manager.latest_step(), args=target)


LOAD = {"flax": load_flax, "orbax": load_orbax}


def main(style: str, directory: Path, *, pause: bool) -> None:
    """Train and save until killed."""

    def between():
        print("half", flush=True)
        time.sleep(600)

    carry, saves = start(), 0
    while True:
        carry = advance(carry)
        count = int(carry[2])
        if count % EVERY == 0:
            saves += 1
            if style == "orbax":
                save_orbax(directory, carry)
            elif pause and saves == 3:
                save_flax(directory, carry, between)
            else:
                save_flax(directory, carry)
        print("step", count, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), pause="pause" in sys.argv)

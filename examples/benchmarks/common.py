"""What the benchmarks share: models, clocks and the bandwidth of the machine."""

import json
from pathlib import Path
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from efcp_jax.passes.entries import Storage


matplotlib.use("Agg")

# Leaves of the models: large enough for low rank, small enough for muon on a CPU.
MATRIX = (1024, 256)


def model(size):
    """Return `size` parameters, matrices of one shape and a vector of the rest."""
    count, rest = divmod(size, MATRIX[0] * MATRIX[1])
    shapes = [MATRIX] * count + ([(rest,)] if rest else [])
    return {f"p{i}": jnp.zeros(shape) for i, shape in enumerate(shapes)}


def random_like(tree, seed=0):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    fresh = [
        jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(fresh)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def filled(state):
    """Return the sparse `state` with a full window of rows that are nearly orthogonal.

    Values are of bfloat16.

    Offsets differ, as they do in training: additions to one place would wait for each
    other.
    """
    window_size = len(state.gram)
    shape = jax.tree.leaves(state.window.rows)[0].shape
    block_size = state.error.shape[1]
    kept = shape[1] // window_size
    step = block_size // kept
    shift = jax.random.randint(jax.random.key(1), shape, 0, step)
    first = step * (jnp.arange(shape[1]) % kept)
    offsets = first.reshape(-1, *[1] * (len(shape) - 2)) + shift
    values = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    window = state.window._replace(
        rows=Storage.of(values.dtype, block_size).store(values, offsets),
        scale=jnp.ones_like(state.window.scale),
        filled=jnp.int32(window_size),
    )
    gram = kept * state.error.size // block_size * jnp.eye(window_size)
    return state._replace(window=window, gram=gram)


def interleaved(calls, runs):
    """Return the median milliseconds of every call, run in turns after a warm-up.

    Each is called twice and timed the second time: the first one finds the caches, and
    the memory that the process holds, as another call has left them.
    """
    times = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            jax.block_until_ready(call())
            time.sleep(0.02)  # the threads of the last call may still spin
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(each)) for name, each in times.items()}


def compiled_step(tx, params, gradient, fill=None):
    """Return a call that makes one donated step, and the state and temporary bytes."""
    state = tx.init(params)
    if fill is not None:
        state = fill(state)
    step = jax.jit(tx.update, donate_argnums=1)
    compiled = step.lower(gradient, state, params).compile()
    size = bytes_of(state)

    def call():
        nonlocal state
        update, state = compiled(gradient, state, params)
        return update

    analysis = compiled.memory_analysis()
    assert analysis is not None  # CPUs and GPUs have one
    return call, size, analysis.temp_size_in_bytes


def bandwidth(size=1 << 26, runs=7):
    """Return the bytes a second that an addition in place reads and writes."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.zeros(size // 4))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        x = jax.block_until_ready(step(x))
        times.append(time.perf_counter() - start)
    return 2 * size / float(np.median(times))


def save(output, name, results, figure):
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=150)
    print(f"wrote {folder / name}.json and .png")

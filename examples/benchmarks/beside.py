"""A whole training step of a transformer beside those of other optimizers.

Seconds to trace and compile it, and milliseconds to run it: the update of 5.2 million
parameters in 50 leaves, applied, all of it donated. Prints a table and writes JSON.

    OPENBLAS_NUM_THREADS=1 python examples/benchmarks/beside.py

Run it on a quiet machine. PSGD-Kron is a row of its own if `rollfast` is installed.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path
import platform
import time

import common
import jax
import jax.numpy as jnp
import optax

import efcp_jax


# Different gradients, so that rows of the window differ.
GRADIENTS = 4


def transformer(width, layers, words):
    """Return the shapes of a transformer's parameters."""
    layer = [
        *[(width, width)] * 4,
        (width, 4 * width),
        (4 * width, width),
        *[(width,)] * 5,
        (4 * width,),
    ]
    return [(words, width), *layer * layers, (width,)]


def optimizers():
    made = {
        "AdamW": optax.adamw(1e-3),
        "SGD with momentum": optax.sgd(1e-3, 0.9),
        "Muon": optax.contrib.muon(1e-3),
        "sparse_ggt(window_size=16)": efcp_jax.sparse_ggt(1e-3, window_size=16),
        "sparse_ggt": efcp_jax.sparse_ggt(1e-3),
        "sparse_ggt(metric=None)": efcp_jax.sparse_ggt(1e-3, metric=None),
        "sparse_mfac": efcp_jax.sparse_mfac(1e-3),
        "low_rank_ggt(window_size=16)": efcp_jax.low_rank_ggt(1e-3, window_size=16),
        "sparse_ggt(block_diagonal=True)": efcp_jax.sparse_ggt(
            1e-3, block_diagonal=True
        ),
    }
    try:
        import rollfast  # pyright: ignore[reportMissingImports]
    except ImportError:
        return made
    return made | {"PSGD-Kron (rollfast)": rollfast.kron(1e-3)}


def prepared(tx, params, gradients, warm):
    """Return a call that makes a step, and what is known before it runs."""
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients[0])
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    analysis = compiled.memory_analysis()
    assert analysis is not None  # CPUs and GPUs have one
    known = {
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "state_bytes": common.bytes_of(state),
        "temporary_bytes": analysis.temp_size_in_bytes,
    }
    count = 0

    def call():
        nonlocal params, state, count
        params, state = compiled(params, state, gradients[count % len(gradients)])
        count += 1
        return params

    # A window that is not full yet has fewer entries to add.
    for _ in range(warm):
        jax.block_until_ready(call())
    return call, known


def measure(shapes, runs, warm, names=None):
    params = {f"p{i}": jnp.zeros(shape) for i, shape in enumerate(shapes)}
    gradients = [common.random_like(params, seed) for seed in range(GRADIENTS)]
    calls, results = {}, {}
    for name, tx in optimizers().items():
        if names is None or name in names:
            calls[name], results[name] = prepared(tx, params, gradients, warm)
    times = common.interleaved(calls, runs)
    for name, result in results.items():
        result["milliseconds"] = times[name]
        result["next_to_adamw"] = times[name] / times["AdamW"]
    return results


def show(results):
    columns = "", "trace s", "compile s", "ms", "next to AdamW", "state MB", "temp MB"
    print("| " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * 6)
    for name, x in results.items():
        cells = [f"{x['trace_seconds']:.1f}", f"{x['compile_seconds']:.1f}"]
        cells += [f"{x['milliseconds']:.1f}", f"{x['next_to_adamw']:.2f}"]
        cells += [f"{x[kind] / 1e6:.1f}" for kind in ("state_bytes", "temporary_bytes")]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--words", type=int, default=8000)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--warm", type=int, default=64, help="steps before the clock")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="beside AdamW")
    parser.add_argument("--output", default="out", help="folder for beside.json")
    args = parser.parse_args(argv)
    shapes = transformer(args.width, args.layers, args.words)
    names = args.only and ["AdamW", *args.only]
    results = measure(shapes, args.runs, args.warm, names)
    version = importlib.metadata.version
    where = {
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": version("optax"),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{name} {value}" for name, value in where.items()) + "\n")
    show(results)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"where": where, "steps": results}, indent=2)
    (folder / "beside.json").write_text(text + "\n")
    return results


if __name__ == "__main__":
    main()

"""Time, memory and bytes of one step, stage by stage, beside other optimizers.

Prints a table for every (parameters, window, density, rank) and writes JSON and a PNG.

    python examples/benchmarks/step.py --sizes 272000,1024,0.01,4 272000,128,0.01,4

Run it on a quiet machine with OPENBLAS_NUM_THREADS=1. The PyTorch rows need `torch`.
"""

import argparse
import functools

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import efcp_jax
from efcp_jax import passes
from efcp_jax.devices import placement
from efcp_jax.preconditioners import mfac_coefficients, system as systems


SIZES = ["272000,128,0.01,4", "272000,1024,0.01,4", "11700000,256,0.01,4"]
# The published step in PyTorch: as it is, and with the least changes that make it fast.
BASELINES = {"PyTorch published": "SparseMfac", "PyTorch improved": "Improved"}
# A dense window above this many bytes is left out.
DENSE_LIMIT = 2e9


def compressor(density, block_size):
    return efcp_jax.top_k(density, block_size=block_size, value_dtype=jnp.bfloat16)


def finite(space, gradient):
    kinds = space.layout.by_kind(jax.tree.leaves(gradient))
    return passes.finite(kinds, lambda: [space.pack(gradient)])


def stages(tx, space, params, gradient, window_size):
    """Return a call for every stage of the sparse step, each compiled by itself."""
    rows = common.filled(tx.init(params)).window.rows
    # A vector for each stage that overwrites its own.
    vectors = [jax.jit(space.pack)(gradient) for _ in range(3)]
    row, *_ = jax.jit(lambda v: space.compress(v, None, True))(vectors[0])
    weights, gram = jnp.ones(window_size), jnp.eye(window_size)

    def overwriting(function, index, *given):
        compiled = jax.jit(function, donate_argnums=0)

        def call():
            vectors[index] = compiled(vectors[index], *given)
            return vectors[index]

        return call

    accumulate = lambda v, g: space.accumulate(g, v, finite(space, g))
    residual = lambda v, r: space.residual(v, r, jnp.float32(1))
    select = jax.jit(lambda v: space.compress(v, None, True)[0])
    inner, update = jax.jit(space.inner), jax.jit(space.update)
    kept = jax.tree.map(jnp.copy, systems.empty(window_size, jnp.float32))
    solve = jax.jit(
        lambda kept, k, s: mfac_coefficients(
            k, s, jnp.int32(0), jnp.float32(1e-2), window_size, kept
        ),
        donate_argnums=0,
    )

    def solving():
        nonlocal kept
        result, kept = solve(kept, gram, weights)
        return result

    return {
        "accumulate": overwriting(accumulate, 0, gradient),
        "select": lambda: select(vectors[1]),
        "residual": overwriting(residual, 2, row),
        "inner": lambda: inner(rows, row),
        "solve": solving,
        "combine": lambda: update(rows, weights),
    }


def measure(size, window_size, density, rank, block_size, runs, speed):
    params = common.model(size)
    gradient = common.random_like(params)
    sparse = compressor(density, block_size)
    # Random rows are shorter than those of a training that has been going on, so a
    # damping in their unit would drift, and be factorised anew all the time.
    mfac = functools.partial(efcp_jax.scale_by_mfac, damping=1e-2)
    optimizers = {
        "sparse M-FAC": mfac(window_size, compressor=sparse),
        "low-rank M-FAC": mfac(window_size, compressor=efcp_jax.low_rank(rank)),
        "AdamW": optax.adamw(1e-3),
        "muon": optax.contrib.muon(1e-3),
        "galore": optax.contrib.galore(1e-3, rank=rank),
    }
    if 4 * size * window_size <= DENSE_LIMIT:
        optimizers["dense M-FAC"] = mfac(window_size)
    calls, held, temporary = {}, {}, {}
    for name, tx in optimizers.items():
        calls[name], held[name], temporary[name] = common.compiled_step(
            tx, params, gradient, common.filled if name == "sparse M-FAC" else None
        )
    try:
        import published
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:
        torch.set_num_threads(2)
        flat = torch.randn(size)
        for name, kind in BASELINES.items():
            baseline = getattr(published, kind)(size, window_size, density)
            calls[name] = lambda baseline=baseline: baseline.step(flat).numpy()
            held[name], temporary[name] = baseline.nbytes, None
    times = common.interleaved(calls, runs)
    space = sparse.bind(placement.layout(params, jnp.float32, None))
    tx = optimizers["sparse M-FAC"]
    parts = common.interleaved(stages(tx, space, params, gradient, window_size), runs)
    window = held["sparse M-FAC"] - 4 * size
    # Two passes over the window; gradient and error read, error and update written.
    bound = 1e3 * (2 * window + 16 * size) / speed
    return {
        "parameters": size,
        "window_size": window_size,
        "density": density,
        "rank": rank,
        "milliseconds": times,
        "stages": parts,
        "state_bytes": held,
        "temporary_bytes": temporary,
        "bound_milliseconds": bound,
        "ratio_to_bound": times["sparse M-FAC"] / bound,
    }


def show(result):
    print(
        "\nd={parameters:,} m={window_size} density={density} rank={rank}".format(
            **result
        )
    )
    print(f"{'optimizer':16}{'ms a step':>12}{'state MB':>12}{'temporary MB':>14}")
    for name, ms in sorted(result["milliseconds"].items(), key=lambda each: each[1]):
        temporary = result["temporary_bytes"][name]
        extra = "-" if temporary is None else f"{temporary / 1e6:.1f}"
        state = result["state_bytes"][name] / 1e6
        print(f"{name:16}{ms:12.2f}{state:12.1f}{extra:>14}")
    print(
        "stages, ms: " + "  ".join(f"{k} {v:.2f}" for k, v in result["stages"].items())
    )
    print(
        f"bytes bound {result['bound_milliseconds']:.2f} ms, sparse M-FAC takes"
        f" {result['ratio_to_bound']:.1f} times that"
    )
    for name in sorted(BASELINES.keys() & result["milliseconds"]):
        ratio = result["milliseconds"][name] / result["milliseconds"]["sparse M-FAC"]
        print(f"{name} takes {ratio:.1f} times as long as sparse M-FAC")


def draw(results):
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 4))
    for axis, result in zip(
        [axes] if len(results) == 1 else axes, results, strict=True
    ):
        names, times = zip(*sorted(result["milliseconds"].items()), strict=True)
        axis.bar(names, times)
        axis.axhline(result["bound_milliseconds"], color="black", linestyle=":")
        axis.set_yscale("log")
        axis.tick_params(axis="x", rotation=60)
        axis.set_title("d={parameters:,}, m={window_size}".format(**result))
        axis.set_ylabel("ms a step (dotted: bytes bound)")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="d,m,density,rank")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", default="out")
    args = parser.parse_args(argv)
    speed = common.bandwidth()
    print(f"{jax.devices()[0].device_kind}, {speed / 1e9:.1f} GB/s in place")
    results = []
    for text in args.sizes:
        size, window_size, density, rank = text.split(",")
        results.append(
            measure(
                int(size),
                int(window_size),
                float(density),
                int(rank),
                args.block_size,
                args.runs,
                speed,
            )
        )
        show(results[-1])
    common.save(
        args.output, "step", {"bandwidth": speed, "results": results}, draw(results)
    )
    return results


if __name__ == "__main__":
    main()

"""What the compilers for CPUs, TPUs and GPUs make of a step; nothing is run.

Prints a table for every platform whose compiler is installed, and writes JSON. For a
TPU v5e that is `jax[tpu]`, for an NVIDIA H100 `jax[cuda12]`; neither has to be there.

    python examples/benchmarks/compiled.py --platforms tpu --cases dense-m16-flat

`bytes` is what a step moves by the compiler's account, with the operands and results of
Pallas kernels; `atomics` are scatters of floats whose sum depends on their order.
Seconds depend on the machine, nothing else does.
"""

import argparse
import json
import os
from pathlib import Path


# Devices are described, not looked for.
os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}

import jax.numpy as jnp
import optax
import programs

import efcp_jax


WIDTH = 256
LAYER = [
    *[(WIDTH, WIDTH)] * 4,
    (WIDTH, 4 * WIDTH),
    (4 * WIDTH, WIDTH),
    *[(WIDTH,)] * 5,
    (4 * WIDTH,),
]
TREES = {
    "flat": [(11_700_000,)],
    "equal": [(512, 512)] * 45,
    "transformer": [(8000, WIDTH), *LAYER * 24],
}


def sparse(kept, block_size=128, value_dtype=jnp.bfloat16):
    """Keep `kept` entries of every block."""
    return efcp_jax.top_k(
        kept / block_size, block_size=block_size, value_dtype=value_dtype
    )


def metric(window_size, compressor):
    return efcp_jax.scale_by_ggt(
        window_size, compressor=compressor, metric=efcp_jax.diagonal_metric()
    )


def mfac(window_size, compressor, **given):
    return efcp_jax.scale_by_mfac(window_size, 1e-4, compressor=compressor, **given)


# By optimizer and tree. Entries kept and block size stand behind "sparse".
CASES = {
    "adamw-flat": optax.adamw(1e-3),
    "adamw-equal": optax.adamw(1e-3),
    "adamw-transformer": optax.adamw(1e-3),
    "muon-equal": optax.contrib.muon(1e-3),
    "muon-transformer": optax.contrib.muon(1e-3),
    "sparse-1/128-m256-flat": mfac(256, sparse(1)),
    "sparse-2/128-m64-flat": mfac(64, sparse(2)),
    "sparse-1/128-m1024-flat": mfac(1024, sparse(1)),
    "int8-1/128-m1024-flat": mfac(1024, sparse(1, value_dtype=jnp.int8)),
    "float8-1/128-m1024-flat": mfac(1024, sparse(1, value_dtype=jnp.float8_e4m3fn)),
    "byte-error-2/128-m64-flat": mfac(64, sparse(2), error_dtype=jnp.int8),
    "by-leaf-2/128-m64-transformer": mfac(64, sparse(2), block_diagonal=True),
    "sparse-1/128-m64-equal": mfac(64, sparse(1)),
    "sparse-1/128-m64-transformer": mfac(64, sparse(1)),
    "sparse-41/4096-m256-flat": mfac(256, sparse(41, 4096)),
    "sparse-ggt-1/128-m64-flat": efcp_jax.scale_by_ggt(64, compressor=sparse(1)),
    "sparse_mfac-flat": efcp_jax.sparse_mfac(1e-2),
    "sparse_ggt-transformer": efcp_jax.sparse_ggt(1.0),
    "ggt-metric-2/128-m16-flat": metric(16, sparse(2)),
    "ggt-metric-2/128-m16-transformer": metric(16, sparse(2)),
    "ggt-metric-low-rank-4-m16-equal": metric(16, efcp_jax.low_rank(4)),
    "low-rank-4-m64-equal": mfac(64, efcp_jax.low_rank(4)),
    "low-rank-4-m64-transformer": mfac(64, efcp_jax.low_rank(4)),
    "dense-m16-flat": mfac(16, efcp_jax.identity()),
    "dense-m16-transformer": mfac(16, efcp_jax.identity()),
}

COLUMNS = {
    "step": lambda r: r["case"],
    "trace s": lambda r: f"{r['trace_seconds']:.1f}",
    "compile s": lambda r: f"{r['compile_seconds']:.1f}",
    "state MB": lambda r: f"{r['state_bytes'] / 1e6:.1f}",
    "temporary MB": lambda r: f"{r['temporary_bytes'] / 1e6:.1f}",
    "%": lambda r: f"{100 * r['temporary_bytes'] / r['state_bytes']:.0f}",
    "bytes GB": lambda r: f"{r['moved_bytes'] / 1e9:.2f}" if r["moved_bytes"] else "-",
    "kernels": lambda r: str(r["kernels"]),
    "atomics": lambda r: str(r["atomics"]),
}


def measure(case, platform):
    tree = case.rpartition("-")[2]
    result = programs.measure(CASES[case], TREES[tree], platform)
    return {"case": case, "platform": platform, **result}


def show(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platforms", nargs="+", choices=programs.COMPILERS)
    parser.add_argument(
        "--cases", nargs="+", metavar="CASE", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--output", default="out", help="folder for compiled.json")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.cases or []) - set(CASES)):
        parser.error(f"unknown cases {', '.join(unknown)}; known: {', '.join(CASES)}")
    for platform in args.platforms or []:
        if package := programs.missing(platform):
            parser.error(f"to compile for {platform}, `{package}` must be installed")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for platform in args.platforms or programs.COMPILERS:
        if programs.missing(platform):
            continue
        print(f"\n{programs.DEVICES[platform]}, compiled, not run:\n")
        show(COLUMNS)
        show(["---"] * len(COLUMNS))
        for case in args.cases or CASES:
            results.append(measure(case, platform))
            show(column(results[-1]) for column in COLUMNS.values())
    path = folder / "compiled.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {path}")
    return results


if __name__ == "__main__":
    main()

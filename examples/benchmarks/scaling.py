"""How the cost of a sparse M-FAC step grows with d, m and k.

Changes one of them at a time, prints the exponents of straight lines fitted on log axes
and writes JSON and a PNG.

    python examples/benchmarks/scaling.py
"""

import argparse

import common
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import efcp_jax


def measure(points, block_size, runs):
    """Return the milliseconds of a step at every (d, m, density)."""
    calls = {}
    for size, window_size, density in points:
        params = {"w": jnp.zeros(size)}
        tx = efcp_jax.scale_by_mfac(
            window_size,
            compressor=efcp_jax.top_k(
                density, block_size=block_size, value_dtype=jnp.bfloat16
            ),
        )
        calls[size, window_size, density], _, _ = common.compiled_step(
            tx, params, common.random_like(params), common.filled
        )
    times = common.interleaved(calls, runs)
    return [times[point] for point in points]


def exponent(values, times):
    return float(np.polyfit(np.log(values), np.log(times), 1)[0])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1 << 20)
    parser.add_argument("--window-size", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--block-size", type=int, default=4096)
    parser.add_argument("--doublings", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", default="out")
    args = parser.parse_args(argv)
    factors = [2**i for i in range(args.doublings + 1)]
    d, m, density = args.size, args.window_size, args.density
    sweeps = {
        "d": [(d * f, m, density) for f in factors],
        "m": [(d, m * f, density) for f in factors],
        "k": [(d, m, density * f) for f in factors],
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    results = {}
    for axis, (name, points) in zip(axes, sweeps.items(), strict=True):
        times = measure(points, args.block_size, args.runs)
        values = [point["dmk".index(name)] for point in points]
        slope = exponent(values, times)
        results[name] = {"values": values, "milliseconds": times, "exponent": slope}
        print(f"{name}: " + "  ".join(f"{t:.2f}" for t in times) + " ms", end="")
        print(f"  time ~ {name}^{slope:.2f}")
        fit = np.exp(np.mean(np.log(times)) - slope * np.mean(np.log(values)))
        axis.loglog(values, times, "o")
        axis.loglog(values, fit * np.asarray(values) ** slope, label=f"{slope:.2f}")
        axis.set_xlabel("density" if name == "k" else name)
        axis.set_ylabel("ms a step")
        axis.legend(title="exponent")
    common.save(args.output, "scaling", results, figure)
    return results


if __name__ == "__main__":
    main()

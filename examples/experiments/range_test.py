"""Choose a learning rate from one short run in which it rises until the loss turns.

What follows the workload is passed on to its own command. The curve and the rate are
written as JSON and PNG.

    python examples/experiments/range_test.py probe --optimizer sparse_ggt
    python examples/experiments/range_test.py images --optimizer sgd --model resnet20
"""

import argparse
import json
from pathlib import Path

from lab import drawing, optimizers, ranges, rate_figure, results
from lab.command import positive
import sweep


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("workload", choices=sweep.COMMANDS)
    add("--optimizer", required=True, metavar="NAME[:KEY=VALUE,...]")
    add("--low", type=positive(float), help="(default: its grid's centre / 1000)")
    add("--high", type=positive(float), help="(default: its grid's centre * 1000)")
    add("--steps", type=positive(int), default=200, help="(default: 200)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("out/ranges"), help="folder")
    own, rest = parser.parse_known_args(argv)

    def measure(parser, args, workload):
        try:
            spec = optimizers.parse(own.optimizer)
            _measure(own, args.scan, spec, workload)
        except (OSError, TypeError, ValueError) as error:
            parser.error(str(error))

    sweep.COMMANDS[own.workload](rest, measure)


def _measure(own, scan, spec, workload):
    """Run the test and write what it has seen."""
    entry = optimizers.REGISTRY[spec.name]
    if entry.searches:
        raise ValueError(f"{spec.name} searches the length of every step by itself")
    centre = entry.centre(spec.settings)
    seen = ranges.measure(
        lambda schedule: optimizers.make(spec, schedule),
        workload,
        own.low or centre / 1000,
        own.high or centre * 1000,
        own.steps,
        own.seed,
        scan,
    )
    config = {**workload.config, "optimizer": str(spec), "steps": own.steps}
    config |= {"low": own.low, "high": own.high, "seed": own.seed}
    own.output.mkdir(parents=True, exist_ok=True)
    path = own.output / f"{workload.name}-{spec.name}-{results.key(config)}"
    kept = {
        name: [float(f"{value:.5g}") for value in getattr(seen, name)]
        for name in ("rates", "losses", "smoothed")
    }
    told = {"config": config, "rate": seen.rate, "turn": seen.turn, **kept}
    path.with_suffix(".json").write_text(json.dumps(told) + "\n")
    drawing.save(rate_figure.rates(seen, f"{workload.name}, {spec}"), f"{path}.png")
    print(
        f"{spec} on {workload.name}: learning rate {seen.rate:g}; the smoothed loss is"
        f" lowest, {seen.smoothed.min():.4g}, at {seen.turn:.3g};"
        f" {len(seen.losses)} steps, {path}.json and .png"
    )


if __name__ == "__main__":
    main()

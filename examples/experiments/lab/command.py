"""The options that every command has, and the loop over all runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lab import optimizers, results, schedules
from lab.runs import Runs
from lab.training import Trainer, divisor
from lab.workload import Workload


EVALUATIONS = 20  # points of a curve, where nothing else is said


def options(description: str | None, batch_seeds: int = 1) -> argparse.ArgumentParser:
    """Return a parser with the options that every command has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("optimizers and runs").add_argument
    add(
        "--optimizers",
        nargs="+",
        metavar="NAME[:KEY=VALUE,...]",
        default=["adamw_b95", "sparse_ggt", "sparse_mfac"],
        help=f"with settings, such as sparse_ggt:window_size=16,metric=false; the names"
        f" are {', '.join(optimizers.REGISTRY)}",
    )
    add(
        "--learning-rates",
        nargs="+",
        default=["default"],
        metavar="RATE",
        help="numbers for all optimizers; `default` for the centre of each one's grid;"
        " `grid` for the grid; `search` to follow it further in its direction while the"
        " best one lies at an end (default: default)",
    )
    add("--grid-size", type=positive(int), default=5, help="(default: 5)")
    add("--grid-factor", type=positive(float), default=2.0, help="(default: 2)")
    add("--steps", type=positive(int), help="steps of a run (default: 400)")
    add("--epochs", type=positive(int), help="in place of --steps")
    add("--seeds", type=positive(int), default=3, help="seeds 0, 1, ... (default: 3)")
    add(
        "--final-seeds",
        type=positive(int),
        help="seeds of each optimizer's best learning rate (default: as all others)",
    )
    add(
        "--batch-seeds",
        type=positive(int),
        default=batch_seeds,
        help=f"seeds trained at once; divides --seeds (default: {batch_seeds})",
    )
    add("--schedule", choices=schedules.SHAPES, default="cosine")
    add(
        "--warmup",
        type=share,
        default=0.05,
        help="share of the steps in which the learning rate rises (default: 0.05)",
    )
    add(
        "--evaluations",
        type=positive(int),
        help=f"points of a curve; divides the steps (default: up to {EVALUATIONS})",
    )
    add(
        "--scan",
        action=argparse.BooleanOptionalAction,
        help="whether many steps are one compiled loop (default: all but convolutions"
        " on CPUs, where that is slow)",
    )
    add("--output", type=Path, default=Path("out/experiments"), help="folder")
    return parser


def positive(kind):
    """Return a type of argparse for numbers above zero."""

    def convert(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def share(text: str) -> float:
    """Return a number of [0, 1), as a type of argparse."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


class Plan(NamedTuple):
    """What the arguments ask for, checked."""

    steps: int
    evaluations: int
    specs: list[optimizers.Spec]
    rates: list[Sequence[float]]
    trainers: list[Trainer]


def check(args, workload: Workload) -> Plan:
    """Return the plan of the arguments; nothing is trained.

    Raises:
        TypeError: A setting of the wrong type.
        ValueError: An argument out of range.
    """
    if args.epochs and args.steps:
        raise ValueError("give --steps or --epochs, not both")
    steps = args.epochs * workload.per_epoch if args.epochs else args.steps or 400
    evaluations = args.evaluations or divisor(steps, EVALUATIONS)
    if steps % evaluations:
        raise ValueError(f"--evaluations {evaluations} must divide the {steps} steps")
    for name in ("seeds", "final_seeds"):
        if (getattr(args, name) or 0) % args.batch_seeds:
            raise ValueError(
                f"--batch-seeds {args.batch_seeds} must divide"
                f" --{name.replace('_', '-')} {getattr(args, name)}"
            )
    if args.learning_rates == ["search"] and args.grid_factor == 1:
        raise ValueError("--grid-factor 1 leaves nothing to search; pass 2")
    specs = [optimizers.parse(text) for text in args.optimizers]
    trainers = [_trainer(args, workload, spec, steps) for spec in specs]
    for trainer in trainers:
        _ = trainer.size  # checks settings
    rates = [_rates(args, spec) for spec in specs]
    return Plan(steps, evaluations, specs, rates, trainers)


def run(parser: argparse.ArgumentParser, args, workload: Workload) -> None:
    """Train what the results do not hold yet; every argument is checked before."""
    try:
        plan = check(args, workload)
        args.output.mkdir(parents=True, exist_ok=True)
        store = results.Results(args.output / f"{workload.name}.json")
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    runs = Runs(args, workload, plan.steps, plan.evaluations, store)
    for spec, rates, trainer in zip(plan.specs, plan.rates, plan.trainers, strict=True):
        means = {peak: runs.mean(spec, peak, trainer, args.seeds) for peak in rates}
        if args.learning_rates == ["search"]:
            runs.search(spec, means, args.grid_factor, trainer)
        if args.final_seeds:
            best = min(means, key=means.__getitem__)
            runs.mean(spec, best, trainer, args.final_seeds)
    print(f"results are in {store.path}")


def _trainer(args, workload, spec, steps):
    shape = schedules.shape(args.schedule, steps, args.warmup)
    make = lambda peak: optimizers.make(spec, lambda step: peak * shape(step))
    return Trainer(workload, make, args.batch_seeds, args.scan)


def _rates(args, spec) -> Sequence[float]:
    entry = optimizers.REGISTRY[spec.name]
    centre = entry.centre(spec.settings)
    if entry.searches:
        return [centre]
    match args.learning_rates:
        case ["grid"] | ["search"]:
            return schedules.grid(centre, args.grid_size, args.grid_factor)
        case ["default"]:
            return schedules.grid(centre, 1, args.grid_factor)
    try:
        return [positive(float)(text) for text in args.learning_rates]
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(
            "--learning-rates takes `default`, `grid`, `search` or numbers above 0, got"
            f" {' '.join(args.learning_rates)}"
        ) from None

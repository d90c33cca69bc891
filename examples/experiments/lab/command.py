"""The options that every command has, and the loop over all runs."""

import argparse
from collections.abc import Sequence
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import jax
import optax

import efcp_jax
from lab import optimizers, results, schedules
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
        help=f"with settings, such as sparse_ggt:window_size=16; the names are"
        f" {', '.join(optimizers.REGISTRY)}",
    )
    add(
        "--learning-rates",
        nargs="+",
        default=["default"],
        metavar="RATE",
        help="numbers for all optimizers; `default` for the centre of each one's grid;"
        " `grid` for the grid (default: default)",
    )
    add("--grid-size", type=positive(int), default=5, help="(default: 5)")
    add("--grid-factor", type=positive(float), default=2.0, help="(default: 2)")
    add("--steps", type=positive(int), help="steps of a run (default: 400)")
    add("--epochs", type=positive(int), help="in place of --steps")
    add("--seeds", type=positive(int), default=3, help="seeds 0, 1, ... (default: 3)")
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
    sizes: list[tuple[float, int]]


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
    if args.seeds % args.batch_seeds:
        raise ValueError(
            f"--batch-seeds {args.batch_seeds} must divide --seeds {args.seeds}"
        )
    specs = [optimizers.parse(text) for text in args.optimizers]
    trainers = [_trainer(args, workload, spec, steps) for spec in specs]
    sizes = [trainer.bytes_per_parameter() for trainer in trainers]  # checks settings
    rates = [_rates(args, spec) for spec in specs]
    return Plan(steps, evaluations, specs, rates, trainers, sizes)


def run(parser: argparse.ArgumentParser, args, workload: Workload) -> None:
    """Train what the results do not hold yet; every argument is checked before."""
    try:
        plan = check(args, workload)
        args.output.mkdir(parents=True, exist_ok=True)
        store = results.Results(args.output / f"{workload.name}.json")
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    seeds = range(args.seeds)
    groups = [seeds[i : i + args.batch_seeds] for i in seeds[:: args.batch_seeds]]
    for spec, rates, trainer, size in zip(*plan[2:], strict=True):
        for peak, group in itertools.product(rates, groups):
            configs = [_config(args, workload, spec, plan, peak, s) for s in group]
            title = f"{spec} lr {peak:g} seeds {','.join(map(str, group))}"
            if all(config in store for config in configs):
                print(f"{title}: there already")
                continue
            outcomes = trainer.run(peak, group, plan.steps, plan.evaluations, title)
            fixed = {
                "bytes_per_parameter": round(size[0], 4),
                "parameters": size[1],
                "machine": _machine(args.batch_seeds),
            }
            pairs = zip(configs, outcomes, strict=True)
            store.add([{"config": c, **outcome, **fixed} for c, outcome in pairs])
            print(f"{title}: {_line(outcomes)}", flush=True)
    print(f"results are in {store.path}")


def _trainer(args, workload, spec, steps):
    shape = schedules.shape(args.schedule, steps, args.warmup)
    make = lambda peak: optimizers.make(spec, lambda step: peak * shape(step))
    return Trainer(workload, make, args.batch_seeds, args.scan)


def _rates(args, spec) -> Sequence[float]:
    centre = optimizers.REGISTRY[spec.name].centre(spec.settings)
    match args.learning_rates:
        case ["grid"]:
            return schedules.grid(centre, args.grid_size, args.grid_factor)
        case ["default"]:
            return schedules.grid(centre, 1, args.grid_factor)
    try:
        return [positive(float)(text) for text in args.learning_rates]
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(
            "--learning-rates takes `default`, `grid` or numbers above 0, got"
            f" {' '.join(args.learning_rates)}"
        ) from None


def _config(args, workload, spec, plan, peak, seed):
    """Return everything that a result depends on, beside the versions."""
    return {
        "workload": workload.name,
        **workload.config,
        "optimizer": spec.name,
        "settings": spec.settings,
        "learning_rate": peak,
        "schedule": args.schedule,
        "warmup": args.warmup,
        "steps": plan.steps,
        "evaluations": plan.evaluations,
        "seed": seed,
    }


def _machine(batch_seeds):
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "batch_seeds": batch_seeds,
        "efcp_jax": efcp_jax.__version__,
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


def _line(outcomes):
    """Return the outcome of some seeds in a line."""
    means = {
        name: sum(each[name] for each in outcomes) / len(outcomes)
        for name in ("loss", "accuracy", "seconds")
    }
    return (
        f"loss {means['loss']:.4f}, accuracy {means['accuracy']:.4f},"
        f" {means['seconds']:.1f} s a run"
    )

"""Whole comparisons with one command: plans of optimizers for any of the workloads.

What follows is passed on to the command of the workload. Learning rates are the grid of
every optimizer unless they are given, of one size for all. What is there already is not
run again.

    python examples/experiments/sweep.py text --plans comparison feedback --steps 400
"""

import argparse

import finetune
import images
from lab.plans import PLANS
import physics
import probe
import text
import vit


COMMANDS = {
    "probe": probe.main,
    "images": images.main,
    "vit": vit.main,
    "text": text.main,
    "finetune": finetune.main,
    "physics": physics.main,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=COMMANDS)
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=["comparison"])
    args, rest = parser.parse_known_args(argv)
    if "--optimizers" in rest:
        parser.error("the plans name the optimizers; run the workload's own command")
    if "--learning-rates" not in rest:
        rest += ["--learning-rates", "grid"]
    specs = list(dict.fromkeys(spec for plan in args.plans for spec in PLANS[plan]))
    COMMANDS[args.workload]([*rest, "--optimizers", *specs])


if __name__ == "__main__":
    main()

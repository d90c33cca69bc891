"""Whole comparisons with one command: plans of optimizers for any of the workloads.

What follows is passed on to the command of the workload. Learning rates are the grid of
every optimizer unless they are given, of one size for all. What is there already is not
run again.

    python examples/experiments/sweep.py text --plans comparison feedback --steps 400
"""

import argparse

import finetune
import images
import probe
import text
import vit


COMMANDS = {
    "probe": probe.main,
    "images": images.main,
    "vit": vit.main,
    "text": text.main,
    "finetune": finetune.main,
}
COMPRESSED = ("sparse_mfac", "low_rank_mfac", "sparse_ggt", "low_rank_ggt")
HALF = "value_dtype=bfloat16,error_dtype=bfloat16"
EXPONENTS = range(1, 7)

PLANS = {
    "comparison": [
        *("adamw_b95", "adamw_b999", "sgd", "muon"),
        *("mfac", "ggt", *COMPRESSED),
    ],
    "feedback": [
        *COMPRESSED,
        *(f"{name}:error_feedback=false" for name in COMPRESSED),
    ],
    "damping": [
        "sparse_mfac",  # the defaults are relative to the window
        *(f"sparse_mfac:damping=1e-{i},relative=true" for i in (0, 2, 3)),
        *(f"sparse_mfac:damping=1e-{i}" for i in EXPONENTS),
        "sparse_ggt",
        *(f"sparse_ggt:eps=1e-{i}" for i in EXPONENTS),
    ],
    "memory": [
        "adamw_b95",
        "ggt",
        *(f"sparse_ggt:window_size={m},{HALF}" for m in (8, 16, 32, 64, 128)),
        *(f"low_rank_ggt:window_size={m},rank=1,{HALF}" for m in (8, 16, 32)),
    ],
    "metric": [
        *("adamw_b95", *COMPRESSED),
        *(f"{name}:metric=true" for name in COMPRESSED),
        *(f"sparse_ggt:window_size={m},metric=true,{HALF}" for m in (8, 16)),
    ],
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

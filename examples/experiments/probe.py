"""Fit the last layer alone: logistic regression on features that stay as they are.

Without --features these are scikit-learn's digits, or `--random N` cosines of random
projections of them (Rahimi and Recht, Random Features for Large-Scale Kernel Machines,
2007). A file of features of a real backbone has the arrays `x_train`, `y_train`,
`x_test` and `y_test`. --published sets what the published probe of sparse GGT says.

    python examples/experiments/probe.py --published --features features.npz
"""

from pathlib import Path

from lab import command, regression


# Seeds at once, measured on two cores: see the README.
BATCH_SEEDS = 1

PUBLISHED = {
    "optimizers": ["sparse_ggt:window_size=100,density=0.01,eps=1e-5"],
    "learning_rates": ["1"],
    "batch_size": 128,
    "epochs": 10,
    "schedule": "cosine",
    "warmup": 0.0,
}


def main(argv: list[str] | None = None, run=command.run) -> None:
    parser = command.options(__doc__, BATCH_SEEDS)
    add = parser.add_argument_group("features").add_argument
    add("--features", type=Path, help="an .npz file with the four arrays")
    add("--random", type=command.positive(int), help="random features of the digits")
    add("--batch-size", type=command.positive(int), default=64, help="(default: 64)")
    add("--published", action="store_true")
    if parser.parse_args(argv).published:
        parser.set_defaults(**PUBLISHED)
    args = parser.parse_args(argv)
    if args.steps and args.published:
        args.epochs = None  # the published experiment, cut short
    if args.features and args.random:
        parser.error("--random is for digits; leave it out with --features")
    try:
        if args.features:
            features = regression.read(args.features)
        else:
            features = regression.digits(args.random)
        workload = regression.workload(features, args.batch_size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    run(parser, args, workload)


if __name__ == "__main__":
    main()

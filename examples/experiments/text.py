"""Train a character transformer on the source of Python's standard library.

The default model has 115,000 parameters; 400 steps take about a minute on two cores.
Results depend on the version of Python, whose text is part of their key.

    python examples/experiments/text.py --optimizers adamw_b95 sparse_ggt --steps 400
"""

from pathlib import Path

from lab import characters, command


# Seeds at once, measured on two cores: see the README.
BATCH_SEEDS = 1


def main(argv: list[str] | None = None, run=command.run) -> None:
    parser = command.options(__doc__, BATCH_SEEDS)
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        workload = make(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    run(parser, args, workload)


def add_options(parser):
    add = parser.add_argument_group("text and model").add_argument
    add("--text", type=Path, help="a text file in place of the standard library")
    add(
        "--characters",
        type=command.positive(int),
        default=2_000_000,
        help="what is taken of the text (default: 2000000)",
    )
    for name, default in {
        "layers": 2,
        "width": 64,
        "heads": 4,
        "context": 64,
        "batch-size": 32,
        "windows": 512,
    }.items():
        add(f"--{name}", type=command.positive(int), default=default)


def read(args):
    """Return the encoded text."""
    text = args.text.read_text() if args.text else characters.standard_library()
    return characters.encode(text, args.characters)


def make(args, text=None, name="text"):
    """Return the workload of the arguments, of a part of the text where it is given."""
    return characters.workload(
        read(args) if text is None else text,
        name=name,
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        context=args.context,
        batch_size=args.batch_size,
        windows=args.windows,
    )


if __name__ == "__main__":
    main()

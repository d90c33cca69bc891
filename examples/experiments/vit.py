"""Train a small vision transformer on the images of `images.py`.

python examples/experiments/vit.py --optimizers adamw_b95 muon sparse_ggt
"""

from lab import command, sources
from lab.vision_transformer import VisionTransformer


# Seeds at once, measured on two cores: see the README.
BATCH_SEEDS = 1


def main(argv: list[str] | None = None, run=command.run) -> None:
    parser = command.options(__doc__, BATCH_SEEDS)
    sources.add_options(parser)
    add = parser.add_argument_group("model").add_argument
    sizes = {"patch": 2, "layers": 2, "width": 64, "heads": 4}
    for name, default in sizes.items():
        add(f"--{name}", type=command.positive(int), default=default)
    args = parser.parse_args(argv)
    chosen = {name: getattr(args, name) for name in sizes}

    def model(classes, shape):
        if shape[0] % args.patch or shape[1] % args.patch:
            raise ValueError(f"--patch {args.patch} does not divide images of {shape}")
        if args.width % args.heads:
            raise ValueError(
                f"--width {args.width} is no multiple of --heads {args.heads}"
            )
        return lambda rngs: VisionTransformer(classes, shape, **chosen, rngs=rngs)

    try:
        workload = sources.workload(args, model, "vit", {"model": "vit", **chosen})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    run(parser, args, workload)


if __name__ == "__main__":
    main()

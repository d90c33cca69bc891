"""Train on one half of the data, then compare optimizers on the other half.

`digits`: classes 0 to 4, then 5 to 9, with the models of `images.py`. `text`: the first
half of the characters, then the second. The first half is trained once, by AdamW, and
kept in the output folder; --params takes a checkpoint of Orbax in its place. Seeds
differ in their batches only.

    python examples/experiments/finetune.py --data text --optimizers muon sparse_ggt
"""

from pathlib import Path

import images
from lab import checkpoints, classifier, command, optimizers, pictures, results
from lab.schedules import shape
from lab.training import Trainer
import text


BASE = {"optimizer": "adamw_b95", "learning_rate": 4e-3, "warmup": 0.05}


def halves(args):
    """Return the workloads of both halves.

    Raises:
        ValueError: Options that no half can be made of.
    """
    if args.data == "text":
        characters = text.read(args)
        middle = len(characters) // 2
        parts = characters[:middle], characters[middle:]
        return [text.make(args, part, "finetune") for part in parts]
    model = images.MODELS[args.model](10, (8, 8, 1))
    config = {"model": args.model}
    return [
        classifier.in_memory(
            pictures.digits(classes), model, config, args.batch_size, "finetune"
        )
        for classes in (range(5), range(5, 10))
    ]


def base(args, workload):
    """Return the parameters that fine-tuning starts from, trained where it must be."""
    if args.params:
        return checkpoints.restore(args.params, workload.init)
    config = {**workload.config, **BASE, "steps": args.base_steps}
    path = args.output / f"base-{results.key(config)}"
    if path.is_dir():
        return checkpoints.restore(path, workload.init)
    decay = shape("cosine", args.base_steps, BASE["warmup"])
    spec = optimizers.parse(BASE["optimizer"])
    make = lambda peak: optimizers.make(spec, lambda step: peak * decay(step))
    trainer = Trainer(workload, make)
    (outcome,), *states = trainer.fit(
        BASE["learning_rate"], [0], args.base_steps, 1, "first half"
    )
    print(f"first half: loss {outcome['loss']:.4f}, kept in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(path, *states)
    return states


def main(argv: list[str] | None = None, run=command.run) -> None:
    parser = command.options(__doc__)
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--data", choices=("digits", "text"), default="digits")
    add("--model", choices=images.MODELS, default="cnn", help="for digits")
    add("--params", type=Path, help="an Orbax checkpoint to start from")
    add("--base-steps", type=command.positive(int), default=400, help="(default: 400)")
    text.add_options(parser)
    args = parser.parse_args(argv)
    try:
        first, second = halves(args)
        command.check(args, second)
        states = base(args, first)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    start = {"start": checkpoints.digest(states)}
    workload = second._replace(
        init=lambda key: tuple(states), config={**second.config, **start}
    )
    run(parser, args, workload)


if __name__ == "__main__":
    main()

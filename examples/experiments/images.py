"""Train image classifiers: digits, Fashion-MNIST, CIFAR-10 or folders like ImageNet's.

Without --data-dir the images are scikit-learn's digits, 8 x 8. A folder with
`train-images-idx3-ubyte.gz` is MNIST or Fashion-MNIST, one with `data_batch_1.bin` is
CIFAR-10; one with `train` and `val` has a folder a class in each. Learning rates are
chosen on training images that are held out, the test set is looked at once.
--published sets what the published experiments say; what is given beside it counts.

    python examples/experiments/images.py --model cnn --optimizers adamw_b95 sparse_mfac
    python examples/experiments/images.py --data-dir fashion-mnist --model resnet20
    python examples/experiments/images.py --data-dir cifar --published cifar_resnet20
"""

from pathlib import Path
import sys

from lab import command, sources
from lab.convolutional import LineCNN, ResNet, SmallCNN


sys.path.append(str(Path(__file__).parents[1]))  # the CNN of the shorter example

from train_digits import CNN


# Seeds at once, measured on two cores: see the README.
BATCH_SEEDS = 1

PUBLISHED = {
    "cifar_resnet20": {
        "hold_out": 0,
        "model": "resnet20",
        "batch_size": 128,
        "epochs": 164,
        "schedule": "staircase",
        "warmup": 0.0,
        "optimizers": [
            "sparse_mfac:window_size=1024,density=0.01,damping=1e-4,weight_decay=1e-4"
        ],
        "learning_rates": ["1e-3"],
    },
    "cifar_resnet18": {
        "hold_out": 0,
        "model": "resnet18",
        "batch_size": 32,
        "epochs": 20,
        "schedule": "cosine",
        "warmup": 0.0,
        "optimizers": [
            "sparse_mfac:window_size=1024,density=0.01,damping=1e-5,weight_decay=5e-4,"
            "clip_update=10"
        ],
        "learning_rates": ["0.03"],
    },
    "imagenet_resnet18": {
        "model": "resnet18",
        "batch_size": 1024,
        "epochs": 88,
        "schedule": "linear",
        "warmup": 0.0,
        "optimizers": [
            "sparse_mfac:window_size=1024,density=0.01,damping=1e-7,weight_decay=1e-5"
        ],
        "learning_rates": ["1e-3"],
    },
}


class DigitsCNN(CNN):
    """The CNN of `train_digits.py`, called like the models with batch statistics."""

    def __call__(self, images, train=True):
        del train
        return super().__call__(images)


def cnn(classes, shape):
    if shape == (8, 8, 1):
        return DigitsCNN
    return lambda rngs: SmallCNN(classes, shape, rngs)


def resnet(blocks, width):
    return lambda classes, shape: (
        lambda rngs: ResNet(classes, shape[2], blocks, width, shape[0] > 64, rngs)
    )


MODELS = {
    "cnn": cnn,
    "cnn1d": lambda classes, shape: lambda rngs: LineCNN(classes, shape[2], rngs),
    "resnet20": resnet((3, 3, 3), 16),
    "resnet18": resnet((2, 2, 2, 2), 64),
}


def main(argv: list[str] | None = None, run=command.run) -> None:
    parser = command.options(__doc__, BATCH_SEEDS)
    sources.add_options(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, default="cnn", help="(default: cnn)")
    add("--published", choices=PUBLISHED, help="settings of a published experiment")
    published = parser.parse_args(argv).published
    parser.set_defaults(**PUBLISHED.get(published, {}))
    args = parser.parse_args(argv)
    if args.steps and published:
        args.epochs = None  # a published experiment, cut short
    try:
        config = {"model": args.model}
        workload = sources.workload(args, MODELS[args.model], "images", config)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    run(parser, args, workload)


if __name__ == "__main__":
    main()

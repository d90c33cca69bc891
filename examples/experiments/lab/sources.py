"""Where images come from: the options, and the workload that they ask for."""

from collections.abc import Callable
from pathlib import Path

from flax import nnx

from lab import classifier, pictures
from lab.command import positive
from lab.workload import Workload


# From the classes and the shape of an image to what makes a model.
Model = Callable[[int, tuple[int, int, int]], Callable[[nnx.Rngs], nnx.Module]]


def add_options(parser) -> None:
    """Add the options of the data."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--data-dir",
        type=Path,
        help="CIFAR-10's binary files, or `train` and `val` with a folder a class;"
        " without it scikit-learn's digits",
    )
    add("--batch-size", type=positive(int), default=64, help="(default: 64)")


def workload(args, model: Model, name: str, model_name: str) -> Workload:
    """Return the workload of the arguments.

    Raises:
        FileNotFoundError: A folder without images.
        ValueError: Files that are not what they should be.
    """
    folder = args.data_dir
    data = pictures.digits() if folder is None else pictures.cifar10(folder)
    shape = data.train[0].shape[1:]
    make = model(data.classes, shape)
    return classifier.in_memory(data, make, model_name, args.batch_size, name)

"""Where images come from: the options, and the workload that they ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from lab import classifier, folders, pictures
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
        help="IDX files of MNIST or Fashion-MNIST, CIFAR-10's binary files, or `train`"
        " and `val` with a folder a class; without it scikit-learn's digits",
    )
    add(
        "--hold-out",
        type=int,
        help="training images that learning rates are chosen on (default: 5,000 of a"
        " data set in files; 0 to choose on the test set)",
    )
    add("--batch-size", type=positive(int), default=64, help="(default: 64)")
    add(
        "--image-size",
        type=positive(int),
        help="sides of images (default: 224 of those from folders, and as they are;"
        " of data sets in files a divisor, whose pixels are means of squares)",
    )


def workload(args, model: Model, name: str, config: dict[str, Any]) -> Workload:
    """Return the workload of the arguments.

    Args:
        args: The options of `add_options`.
        model: The model, before classes and shapes are known.
        name: Names the file of the results.
        config: What tells the model from others, JSON values.

    Raises:
        FileNotFoundError: A folder without images.
        ValueError: Files that are not what they should be, or too few.
    """
    folder = args.data_dir
    if folder and (folder / "train").is_dir():
        return _streamed(args, model, name, config)
    data = pictures.read(folder, args.hold_out) if folder else pictures.digits()
    if args.image_size:
        data = pictures.shrunk(data, args.image_size)
    make = model(data.classes, data.train[0].shape[1:])
    return classifier.in_memory(data, make, config, args.batch_size, name)


def _streamed(args, model, name, config):
    size = args.image_size or 224
    found = folders.find(args.data_dir, size)
    if args.batch_size > len(found.train):
        raise ValueError(
            f"--batch-size {args.batch_size} is above the {len(found.train)} images"
        )
    label = f"{args.data_dir.resolve().name} {size}"
    sizes = {"images": len(found.train), "batch_size": args.batch_size}
    shape = (size, size, 3)
    return classifier.streamed(
        name,
        {"data": label, **config, **sizes},
        model(len(found.classes), shape),
        folders.describe(found, label),
        lambda rng: folders.batches(found, args.batch_size, rng),
        lambda: folders.evaluations(found, args.batch_size),
        len(found.train) // args.batch_size,
    )

"""Images in folders, `train/CLASS/*` and `val/CLASS/*`, read by Grain's threads."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.pictures import Pictures


ENDINGS = {".jpeg", ".jpg", ".png", ".webp"}
THREADS = 16
# Of ImageNet, as everywhere.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folder(NamedTuple):
    """Files with their labels, and how large their images shall be.

    Attributes:
        train: Paths and labels.
        val: Paths and labels.
        classes: Names of the classes, in the order of their labels.
        size: Height and width that images are brought to.
    """

    train: list[tuple[Path, int]]
    val: list[tuple[Path, int]]
    classes: list[str]
    size: int


def find(folder: Path, size: int) -> Folder:
    """Return the files below `folder`.

    Raises:
        FileNotFoundError: A folder or all of its images are missing.
        ValueError: Classes of `val` that `train` does not have.
    """
    both = {}
    for part in ("train", "val"):
        names = sorted(p.name for p in (folder / part).glob("*") if p.is_dir())
        files = {
            name: sorted(
                file
                for file in (folder / part / name).iterdir()
                if file.suffix.lower() in ENDINGS
            )
            for name in names
        }
        if not any(files.values()):
            raise FileNotFoundError(
                f"{folder / part} has no folders of images; --data-dir takes a folder"
                " with train/CLASS/*.jpg and val/CLASS/*.jpg"
            )
        both[part] = files
    classes = list(both["train"])
    unknown = sorted(set(both["val"]) - set(classes))
    if unknown:
        raise ValueError(
            f"{folder / 'val'} has classes that train has not: {', '.join(unknown)}"
        )
    listed = {
        part: [(f, classes.index(name)) for name, each in files.items() for f in each]
        for part, files in both.items()
    }
    return Folder(listed["train"], listed["val"], classes, size)


def describe(folder: Folder, name: str) -> Pictures:
    """Return what the classifier needs to know, without any images."""
    nothing = (np.zeros((0, folder.size, folder.size, 3), np.uint8), np.zeros(0))
    count = len(folder.classes)
    return Pictures(name, nothing, nothing, count, MEAN, DEVIATION, augment=False)


def batches(
    folder: Folder, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of random crops, flipped or not, for ever.

    Images and labels of a generator's seed are the same in every run, however many
    threads read them.
    """
    import grain

    data = (
        grain.MapDataset.source(folder.train)
        .seed(int(rng.integers(1 << 31)))
        .shuffle()
        .repeat()
        .random_map(lambda file, rng: _read(file, folder.size, rng))
        .batch(batch_size, drop_remainder=True)
        .to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4))
    )
    yield from data


def evaluations(folder: Folder, batch_size: int):
    """Yield the held-out images, the middle of each, the last batch being smaller."""
    import grain

    data = (
        grain.MapDataset.source(folder.val)
        .map(lambda file: _read(file, folder.size, None))
        .batch(batch_size)
        .to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4))
    )
    yield from data


def _read(file, size, rng):
    """Return an image of `size` x `size` and its label; without `rng` the middle."""
    from PIL import Image

    path, label = file
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    box = _middle(*image.size) if rng is None else _random_box(*image.size, rng)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image, np.uint8)
    if rng is not None and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels), np.int32(label)


def _middle(width, height):
    """Return the box of the middle square, 7 eighths of the shorter side."""
    side = 0.875 * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(width, height, rng):
    """Return a box of 8 to 100% of the area whose sides are as 3:4 up to 4:3."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return _middle(width, height)

"""Data sets of images that fit into memory: digits, (Fashion-)MNIST and CIFAR-10."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lab import idx


class Pictures(NamedTuple):
    """Images `(examples, height, width, channels)` of bytes, and labels.

    Attributes:
        name: Part of the key of every result.
        train: Images and labels.
        test: Images and labels.
        held_out: Training images and labels that learning rates are chosen on; None if
            that is done on the test's.
        classes: How many labels there are.
        mean: Mean of every channel, in [0, 1].
        deviation: Standard deviation of every channel.
        augment: Whether training images are shifted and flipped.
    """

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    augment: bool
    held_out: tuple[np.ndarray, np.ndarray] | None = None


def read(folder: Path, hold_out: int | None) -> Pictures:
    """Return the data set of a folder, and print what its files sum to.

    Args:
        folder: IDX files or CIFAR-10's.
        hold_out: Training images that learning rates are chosen on, the same in every
            run; 0 to choose on the test's, None for 5,000 or a tenth, if that is less.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is not what it should be, or there are too few images.
    """
    paths = idx.find(folder)
    data = cifar10(folder) if paths is None else _of_idx(folder, paths)
    count = len(data.train[1])
    held = min(5000, count // 10) if hold_out is None else hold_out
    if held >= count:
        raise ValueError(f"--hold-out {held} leaves none of the {count} images")
    if not held:
        return data
    order = np.random.default_rng(0).permutation(count)
    taken, rest = np.sort(order[:held]), np.sort(order[held:])
    parts = (tuple(each[index] for each in data.train) for index in (rest, taken))
    train, held_out = parts
    name = f"{data.name}, {held} held out"
    return data._replace(name=name, train=train, held_out=held_out)


def shrunk(data: Pictures, size: int) -> Pictures:
    """Return the images with sides of `size` pixels, the means of squares of pixels.

    Raises:
        ValueError: `size` does not divide the sides.
    """
    sides = data.train[0].shape[1:3]
    if sides[0] % size or sides[1] % size:
        raise ValueError(
            f"--image-size {size} must divide the sides of the images,"
            f" {sides[0]} x {sides[1]}"
        )

    def means(part):
        images, labels = part
        shape = (-1, size, sides[0] // size, size, sides[1] // size, images.shape[-1])
        found = images.reshape(shape).mean(axis=(2, 4), dtype=np.float32)
        return np.round(found).astype(np.uint8), labels

    scaled = (train := means(data.train))[0] / np.float32(255)
    return data._replace(
        name=f"{data.name}, {size} x {size}",
        train=train,
        test=means(data.test),
        held_out=data.held_out and means(data.held_out),
        mean=tuple(map(float, scaled.mean(axis=(0, 1, 2)))),
        deviation=tuple(map(float, scaled.std(axis=(0, 1, 2)))),
    )


def _of_idx(folder, paths):
    (train, test), total = idx.read(paths)
    print(f"{folder}: sha256 {total}")
    scaled = train[0] / np.float32(255)
    return Pictures(
        f"{folder.resolve().name} {total[:8]}",
        train,
        test,
        1 + int(max(train[1].max(), test[1].max())),
        (float(scaled.mean()),),
        (float(scaled.std()),),
        augment=True,
    )


def digits(classes: range = range(10)) -> Pictures:
    """Return scikit-learn's digits of some classes, a fifth of them held out."""
    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    kept = np.isin(labels, classes)
    images, labels = images[kept], labels[kept].astype(np.int32)
    order = np.arange(len(images))
    train, test = map(
        np.asarray, train_test_split(order, test_size=0.2, random_state=0)
    )
    name = "digits" if len(classes) == 10 else f"digits {classes[0]}-{classes[-1]}"
    return Pictures(
        name=name,
        train=(images[train], labels[train]),
        test=(images[test], labels[test]),
        classes=10,
        mean=(0.0,),
        deviation=(1.0,),
        augment=False,
    )


def cifar10(folder: Path) -> Pictures:
    """Return CIFAR-10 from its binary form, `data_batch_1.bin` and so on.

    Every record is a byte of label and 32 x 32 bytes of red, of green and of blue.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is no whole number of records, or has labels above 9.
    """
    inner = folder / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else folder
    parts = [_records(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    whole = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    print(f"{folder}: sha256 of training images and labels {whole}")
    return Pictures(
        "cifar10",
        (images, labels),
        _records(folder / "test_batch.bin"),
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        augment=True,
    )


def _records(path):
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; --data-dir takes the folder of CIFAR-10's binary"
            " version, cifar-10-binary.tar.gz unpacked"
        )
    data = np.fromfile(path, np.uint8)
    if not data.size or data.size % 3073:
        raise ValueError(f"{path} has {data.size} bytes, which are no records of 3073")
    records = data.reshape(-1, 3073)
    labels = records[:, 0].astype(np.int32)
    if labels.max() > 9:
        raise ValueError(f"{path} has labels up to {labels.max()}; there are 0 to 9")
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def shift_and_flip(images: jax.Array, key: jax.Array, pad: int) -> jax.Array:
    """Shift every image by up to `pad` pixels over zeros, and flip half of them."""
    count, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    where, which = jax.random.split(key)
    corners = jax.random.randint(where, (count, 2), 0, 2 * pad + 1)
    flips = jax.random.bernoulli(which, 0.5, (count,))

    def one(image, corner, flip):
        start = (corner[0], corner[1], 0)
        cut = jax.lax.dynamic_slice(image, start, (height, width, channels))
        return jnp.where(flip, cut[:, ::-1], cut)

    return jax.vmap(one)(padded, corners, flips)

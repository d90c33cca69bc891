"""IDX files, in which MNIST and Fashion-MNIST come, packed by gzip or not."""

import gzip
import hashlib
import math
from pathlib import Path
import zlib

import numpy as np


NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3",
         "t10k-labels-idx1")  # fmt: skip


def find(folder: Path) -> list[Path] | None:
    """Return training images and labels, test images and labels, or None.

    They lie in the folder, as Keras keeps them, or in a folder `raw` below it, as
    torchvision does.
    """
    found = []
    for name in NAMES:
        endings = (f"{name}-ubyte{packed}" for packed in ("", ".gz"))
        places = (
            place / ending
            for ending in endings
            for place in (folder, folder / "raw", *folder.glob("*/raw"))
        )
        found.append(next((path for path in places if path.exists()), None))
    missing = [name for name, path in zip(NAMES, found, strict=True) if path is None]
    if missing and len(missing) < len(NAMES):
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}-ubyte[.gz]")
    return None if missing else found


def read(paths: list[Path]) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """Return images `(examples, height, width, 1)` and labels, of both pairs of files.

    And the SHA-256 sum of what the files hold, one behind the other.

    Raises:
        ValueError: A file is damaged, of another kind or size than its first bytes say,
            or there are other numbers of images than of labels.
    """
    pairs, whole = [], hashlib.sha256()
    for files in (paths[:2], paths[2:]):
        held = [_bytes(path) for path in files]
        for data in held:
            whole.update(data)
        given = zip(files, held, (3, 1), strict=True)
        images, labels = (_array(*each) for each in given)
        if len(images) != len(labels):
            raise ValueError(
                f"{files[0]} has {len(images)} images and {files[1]} {len(labels)}"
                " labels"
            )
        pairs.append((images[..., None], labels.astype(np.int32)))
    return pairs, whole.hexdigest()


def _array(path, data, axes):
    """Return the bytes of a file in their shape."""
    start = 4 + 4 * axes
    # Two zeros, the code of bytes without sign, and the number of axes.
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) < start:
        raise ValueError(
            f"{path} begins with {data[:4].hex(' ')}; an IDX file of bytes with"
            f" {axes} axes begins with 00 00 08 0{axes}"
        )
    shape = tuple(np.frombuffer(data[4:start], ">u4").astype(int))
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path} has {len(data) - start} bytes behind its head, which says"
            f" {' x '.join(map(str, shape))}; is it cut short?"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _bytes(path):
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None

"""Multinomial logistic regression on fixed features."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lab import classifying, pictures
from lab.workload import Workload, in_order, shuffled


NAMES = ("x_train", "y_train", "x_test", "y_test")
EVALUATION_BATCH = 4096
BANDWIDTH = 3.0  # of the random features, about the distance of two digits


class Features(NamedTuple):
    """Features `(examples, features)`, labels `(examples,)`, and a name for the key."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def digits(random: int | None = None) -> Features:
    """Return the digits' 64 pixels, or `random` cosines of them, always the same."""
    data = pictures.digits()
    flat = lambda part: part[0].reshape(len(part[0]), -1).astype(np.float32) / 255
    train, test = flat(data.train), flat(data.test)
    name = "digits"
    if random:
        rng = np.random.default_rng(0)
        projection = rng.normal(0, 1 / BANDWIDTH, (train.shape[1], random))
        phase = rng.uniform(0, 2 * np.pi, random)
        cosines = lambda x: (
            np.sqrt(2) * np.cos(x @ projection + phase).astype(np.float32)
        )
        train, test = cosines(train), cosines(test)
        name = f"digits, {random} random features"
    return Features(name, train, data.train[1], test, data.test[1])


def read(path: Path) -> Features:
    """Return the features of an .npz file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Arrays that are missing, of other shapes, or not finite.
    """
    with np.load(path) as file:
        missing = [name for name in NAMES if name not in file]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing)}; it has {file.files}")
        x_train, y_train, x_test, y_test = (file[name] for name in NAMES)
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise ValueError(
                f"x_{name} must be (examples, features) and y_{name} (examples,), got"
                f" {x.shape} and {y.shape}"
            )
        if not np.isfinite(x).all():
            raise ValueError(f"x_{name} has entries that are not finite")
        if y.dtype.kind not in "iu" or y.min() < 0:
            raise ValueError(f"y_{name} must be integers from 0, got {y.dtype}")
    if x_train.shape[1] != x_test.shape[1]:
        raise ValueError(f"x_train has {x_train.shape[1]} features, x_test"
                         f" {x_test.shape[1]}")  # fmt: skip
    name = f"{path.name} {hashlib.sha256(x_train.tobytes()).hexdigest()[:8]}"
    single = lambda x: x.astype(np.float32)
    return Features(name, single(x_train), y_train, single(x_test), y_test)


def workload(features: Features, batch_size: int) -> Workload:
    """Return the workload; parameters start at zero, so seeds differ in batches only.

    Raises:
        ValueError: A batch larger than the data.
    """
    count, width = features.x_train.shape
    if batch_size > count:
        raise ValueError(f"--batch-size {batch_size} is above the {count} examples")
    classes = 1 + int(max(features.y_train.max(), features.y_test.max()))
    labels = lambda y: jnp.asarray(y, jnp.int32)
    logits = lambda params, x: x @ params["head"] + params["bias"][None]

    def init(key):
        del key
        return {"head": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}, ()

    def loss(params, statistics, batch):
        x, y = batch
        return classifying.cross_entropy(logits(params, x), y).mean(), statistics

    def evaluate(params, statistics, data, index):
        del statistics
        x, y = data["test"]
        return classifying.sums(logits(params, x[index]), y[index])

    return Workload(
        name="probe",
        config={"features": features.name, "batch_size": batch_size},
        data={
            "train": (jnp.asarray(features.x_train), labels(features.y_train)),
            "test": (jnp.asarray(features.x_test), labels(features.y_test)),
        },
        init=init,
        batches=lambda rng: shuffled(count, batch_size, rng),
        batch=lambda data, index, key: jax.tree.map(lambda x: x[index], data["train"]),
        loss=loss,
        evaluations=lambda: in_order(len(features.y_test), EVALUATION_BATCH),
        evaluate=evaluate,
        per_epoch=count // batch_size,
    )

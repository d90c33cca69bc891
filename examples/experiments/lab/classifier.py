"""The workload of a classifier of images, in memory or from a stream."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lab import classifying
from lab.pictures import Pictures, shift_and_flip
from lab.workload import Workload, in_order, shuffled


EVALUATION_BATCH = 500


def in_memory(
    pictures: Pictures,
    model: Callable[[nnx.Rngs], nnx.Module],
    config: dict[str, Any],
    batch_size: int,
    name: str = "images",
) -> Workload:
    """Return the workload of images that stay on the device.

    Args:
        pictures: The data.
        model: Makes a model, called with images and with `train`.
        config: What tells the model from others, part of the key of the results.
        batch_size: Images in a batch.
        name: Names the file of the results.

    Raises:
        ValueError: A batch larger than the data.
    """
    count = len(pictures.train[1])
    if batch_size > count:
        raise ValueError(f"--batch-size {batch_size} is above the {count} images")
    take = lambda part, index: (part[0][index], part[1][index])

    def batch(data, index, key):
        images, labels = take(data["train"], index)
        if pictures.augment:
            images = shift_and_flip(images, key, round(images.shape[1] / 8))
        return images, labels

    evaluated, held = pictures.test, pictures.held_out
    tests = chosen_on = in_order(len(evaluated[1]), EVALUATION_BATCH)
    if held is not None:  # behind the test's
        first = len(evaluated[1])
        chosen_on = [first + i for i in in_order(len(held[1]), EVALUATION_BATCH)]
        evaluated = jax.tree.map(lambda *e: np.concatenate(e), evaluated, held)
    return _workload(
        pictures,
        model,
        name=name,
        config={"data": pictures.name, **config, "batch_size": batch_size},
        data=jax.tree.map(jnp.asarray, {"train": pictures.train, "held": evaluated}),
        batches=lambda rng: shuffled(count, batch_size, rng),
        batch=batch,
        held_out=lambda data, index: take(data["held"], index),
        evaluations=lambda: chosen_on,
        tests=None if held is None else lambda: tests,
        per_epoch=count // batch_size,
    )


def streamed(
    name: str,
    config: dict[str, Any],
    model: Callable[[nnx.Rngs], nnx.Module],
    pictures: Pictures,
    batches: Callable[[np.random.Generator], Iterator[Any]],
    evaluations: Callable[[], Iterable[Any]],
    per_epoch: int,
) -> Workload:
    """Return the workload of batches that come from elsewhere, a few at a time."""
    return _workload(
        pictures,
        model,
        name=name,
        config=config,
        data=(),
        batches=batches,
        batch=lambda data, item, key: item,
        held_out=lambda data, item: item,
        evaluations=evaluations,
        per_epoch=per_epoch,
        chunk=1,
    )


def _workload(pictures, model, *, held_out, **others):
    graph, init = classifying.split(model)

    def apply(params, statistics, images, train):
        merged = nnx.merge(graph, params, statistics, copy=True)
        mean, deviation = (
            jnp.array(each)[None, None, None]
            for each in (pictures.mean, pictures.deviation)
        )
        logits = merged((images / 255.0 - mean) / deviation, train)
        return logits, nnx.state(merged, nnx.BatchStat)

    def loss(params, statistics, batch):
        images, labels = batch
        logits, statistics = apply(params, statistics, images, True)
        return classifying.cross_entropy(logits, labels).mean(), statistics

    def evaluate(params, statistics, data, item):
        images, labels = held_out(data, item)
        return classifying.sums(apply(params, statistics, images, False)[0], labels)

    convolutions = _has_convolutions(model)
    return Workload(
        init=init, loss=loss, evaluate=evaluate, convolutions=convolutions, **others
    )


def _has_convolutions(model):
    """Return whether a kernel of the model has more than two axes."""
    params = nnx.state(nnx.eval_shape(lambda: model(nnx.Rngs(0))), nnx.Param)
    return any(leaf.ndim > 2 for leaf in jax.tree.leaves(params))

"""What is trained, apart from how."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np


class Workload(NamedTuple):
    """A model with its data; all functions but the two of batches are compiled.

    Attributes:
        name: Names the file of the results.
        config: What tells this workload from others, JSON values; part of every key.
        data: Arrays that stay on the device, handed to `batch` and `evaluate`.
        init: From a key to the parameters and to what the model keeps beside them,
            such as batch statistics; `()` for nothing.
        batches: From a generator to the endless stream of items that `batch` takes:
            indices where the data is on the device, examples where it is not.
        batch: From `data`, an item and a key to a batch.
        loss: From parameters, statistics and a batch to the mean loss and the next
            statistics.
        evaluations: The items that the held-out data is evaluated on.
        evaluate: From parameters, statistics, `data` and an item to sums: `count`,
            `loss` and others, such as `accuracy`, whose means are told.
        per_epoch: Batches that make an epoch.
        chunk: Most steps that are compiled into one loop; fewer where items are large.
        convolutions: Whether the model has any, which decides how CPUs loop.
        tests: The items of a test set, which is looked at once, behind the last step;
            None if the held-out data is all there is.
    """

    name: str
    config: dict[str, Any]
    data: Any
    init: Callable[[jax.Array], tuple[Any, Any]]
    batches: Callable[[np.random.Generator], Iterator[Any]]
    batch: Callable[[Any, Any, jax.Array], Any]
    loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]]
    evaluations: Callable[[], Iterable[Any]]
    evaluate: Callable[[Any, Any, Any, Any], dict[str, jax.Array]]
    per_epoch: int
    chunk: int = 50
    convolutions: bool = False
    tests: Callable[[], Iterable[Any]] | None = None


def shuffled(examples: int, batch_size: int, rng: np.random.Generator):
    """Yield the indices of batches, every epoch in a new order and without its rest."""
    while True:
        order = rng.permutation(examples)
        for first in range(0, examples - batch_size + 1, batch_size):
            yield order[first : first + batch_size].astype(np.int32)


def in_order(examples: int, batch_size: int) -> list[np.ndarray]:
    """Return the indices of all examples in batches, of which the last is smaller."""
    return [
        np.arange(first, min(first + batch_size, examples), dtype=np.int32)
        for first in range(0, examples, batch_size)
    ]

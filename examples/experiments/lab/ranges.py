"""A learning rate from one short run in which it rises (Smith, 2017).

Works for every optimizer that takes a schedule, and for every `Workload`.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import numpy as np
import optax

from lab.training import Trainer
from lab.workload import Workload


SMOOTHING = 0.9  # decay of the average of losses
BELOW = 4.0  # what the rate of lowest loss is divided by: see the README


class Range(NamedTuple):
    """What a range test has seen.

    Attributes:
        rates: The learning rate of every step, `(steps,)`.
        losses: The loss before every step, `(steps,)`.
        smoothed: Their average over steps, `(steps,)`.
        turn: The rate at which the average was lowest.
        rate: The one to take as the peak of a schedule.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    turn: float
    rate: float


def measure(
    optimizer: Callable[[Any], optax.GradientTransformation],
    workload: Workload,
    low: float = 1e-6,
    high: float = 1e2,
    steps: int = 200,
    seed: int = 0,
    scan: bool | None = None,
) -> Range:
    """Raise the learning rate until the smoothed loss turns, and choose one below.

    Args:
        optimizer: From a learning rate, here a schedule, to a gradient transformation.
        workload: What is trained.
        low: The first rate, above 0.
        high: The last one, above `low`.
        steps: Steps from one to the other, each by the same factor.
        seed: Of parameters and batches.
        scan: As in `Trainer`.

    Raises:
        ValueError: Rates that do not rise, too few steps, or a first loss that is not
            finite.
    """
    if not 0 < low < high:
        raise ValueError(f"rates must rise from above 0, got {low:g} to {high:g}")
    if steps < 20:
        raise ValueError(f"a range of {steps} steps is too short; take 20 or more")
    growth = (high / low) ** (1 / (steps - 1))
    rising = lambda peak: optimizer(lambda step: peak * growth**step)
    trainer = Trainer(workload, rising, scan=scan)
    losses: list[float] = []
    for loss in trainer.losses(low, seed, steps):
        losses.append(float(loss))
        if turned(losses):
            break
    return choose(low * growth ** np.arange(len(losses)), np.array(losses))


def smooth(losses: np.ndarray) -> np.ndarray:
    """Return the average of the losses so far, older ones weighing less, unbiased."""
    weights = np.cumsum(SMOOTHING ** np.arange(len(losses)))
    total, averages = 0.0, []
    for loss in losses:
        total = SMOOTHING * total + loss
        averages.append(total)
    return np.array(averages) / weights


def turned(losses: list[float]) -> bool:
    """Return whether half of what the average had gained is lost, or all is."""
    if not math.isfinite(losses[-1]):
        return True
    averages = smooth(np.array(losses))
    gain = max(averages[0] - averages.min(), 0.1 * abs(averages[0]))
    return averages[-1] > averages.min() + gain / 2


def choose(rates: np.ndarray, losses: np.ndarray) -> Range:
    """Return the range of these losses.

    Raises:
        ValueError: A first loss that is not finite.
    """
    finite = np.isfinite(losses)
    count = len(losses) if finite.all() else int(finite.argmin())
    if not count:
        raise ValueError("the loss is not finite at the first rate; begin lower")
    smoothed = smooth(losses[:count])
    turn = float(rates[smoothed.argmin()])
    kept = rates[:count], losses[:count]
    return Range(*kept, smoothed, turn, float(f"{turn / BELOW:.3g}"))

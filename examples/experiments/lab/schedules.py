"""Learning rates over the steps of a run, and the grids that are searched."""

import functools

import optax


# Each is one at the peak; `steps` is what is left behind the warm-up.
SHAPES = {
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
    "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    "constant": lambda steps: optax.constant_schedule(1.0),
    # The published one of ResNet-20: by ten at a half and at three quarters.
    "staircase": lambda steps: optax.piecewise_constant_schedule(
        1.0, {steps // 2: 0.1, 3 * steps // 4: 0.1}
    ),
}


@functools.cache
def shape(name: str, steps: int, warmup: float) -> optax.Schedule:
    """Return a schedule of peak one: a linear rise, then the shape called `name`.

    The rise takes the share `warmup` of the steps.
    """
    rising = round(warmup * steps)
    falling = SHAPES[name](max(steps - rising, 1))
    if not rising:
        return falling
    # Not from zero: the first step would be none.
    rise = optax.linear_schedule(1 / rising, 1.0, rising)
    return optax.join_schedules([rise, falling], [rising])


def grid(centre: float, size: int, factor: float) -> list[float]:
    """Return `size` learning rates around `centre`, each `factor` times the last.

    An even size has one more below the centre than above. Three digits are kept, so
    that the same value is the same key wherever it is computed.
    """
    exponents = range(-(size // 2), size - size // 2)
    return [float(f"{centre * factor**exponent:.3g}") for exponent in exponents]

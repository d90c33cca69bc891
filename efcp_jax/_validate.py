"""Checks of configuration values, raised where the user stands.

Structural values (sizes, counts, dtypes) shape the arrays of the state, so they must
be Python values; hyperparameters may be traced and are checked when concrete.
"""

import math
import numbers
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np


# The interval that each number must be in, and what to pass instead.
_NUMBERS = {
    "learning_rate": ("(-inf, inf)", "a number or a schedule from step to number"),
    "damping": ("(0, inf)", "a small number such as 1e-5"),
    "eps": ("[0, inf)", "a small number such as 1e-4"),
    "b1": ("[0, 1)", "0.0 for no momentum"),
    "b2": ("(0, 1]", "1.0 for no decay"),
    "momentum": ("[0, 1)", "None for no momentum"),
    "weight_decay": ("[0, inf)", "0.0 for no weight decay"),
    "density": ("(0, 1]", "`density=0.01` for one entry in a hundred, 1.0 for all"),
    "decay": ("[0, 1)", "0.95"),
    "floor": ("[0, inf)", "0.1"),
    "diagonal": ("(0, inf)", "positive numbers"),
}


def number(name: str, value: Any) -> Any:
    """Return `value`, or raise if it is concrete and outside the interval of `name`.

    Schedules and tracers pass: their values are not known here.
    """
    if callable(value) or isinstance(value, Tracer):
        return value
    return _in_interval(name, value, " or a schedule")


def number_now(name: str, value: Any) -> float:
    """Return `value` as a float, or raise; no schedule, and nothing traced."""
    _reject_tracer(name, value)
    return float(_in_interval(name, value, ", not a schedule"))


def _in_interval(name: str, value: Any, alternative: str = "") -> Any:
    interval, remedy = _NUMBERS[name]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        kinds = jnp.floating, jnp.integer
        real = not value.ndim and any(jnp.issubdtype(value.dtype, k) for k in kinds)
        got = f"an array of shape {value.shape} and dtype {value.dtype}"
    else:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        got = f"{value!r} of type {type(value).__name__}"
    if not real:
        raise TypeError(
            f"`{name}` must be a number in {interval}{alternative}, got {got}. Pass"
            f" {remedy}."
        )
    low, high = map(float, interval[1:-1].split(", "))
    concrete = float(value)
    above = concrete > low or (concrete == low and interval[0] == "[")
    below = concrete < high or (concrete == high and interval[-1] == "]")
    if not (math.isfinite(concrete) and above and below):
        raise ValueError(
            f"`{name}` must be in {interval}, got {concrete}. Pass {remedy}."
        )
    return value


def positive_int(name: str, value: Any) -> int:
    """Return `value` as an int, or raise if it is not an integer of at least 1."""
    _reject_tracer(name, value)
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise (ValueError if whole else TypeError)(
            f"`{name}` must be an integer >= 1, got {value!r}. Pass a whole number such"
            f" as `{name}=32`, at least `{name}=1`."
        )
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """Return `value`, or raise if it is not a Python bool."""
    _reject_tracer(name, value)
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return `value`, or raise if it is not one of the `allowed` strings."""
    if not isinstance(value, str) or value not in allowed:
        options = " or ".join(repr(option) for option in allowed)
        raise ValueError(f"`{name}` must be {options}, got {value!r}.")
    return value


def floating_dtype(
    name: str,
    value: Any,
    narrow: tuple[str, ...] = (),
    remedy: str = "Values of 8 bits there are for `value_dtype` of `top_k` only.",
) -> np.dtype | None:
    """Return `value` as a dtype, or raise if numbers cannot be stored in it.

    Args:
        name: The argument.
        value: What was passed; None stands for itself.
        narrow: Names of the dtypes of 8 bits that there are, besides real floating ones
            of 16 bits or more.
        remedy: What to do where there are none.
    """
    if value is None:
        return None
    kinds = " or ".join(("a real floating dtype of at least 16 bits", *narrow))
    options = ", ".join(f"jnp.{each}" for each in ("float32", "bfloat16", *narrow))
    advice = f"Pass one of {options}." + ("" if narrow else f" {remedy}")
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"`{name}` must be {kinds}, got {value!r}. {advice}") from error
    wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    if not wide and dtype.name not in narrow:
        raise ValueError(f"`{name}` must be {kinds}, got {dtype}. {advice}")
    return dtype


def transformation(tx: Any) -> Any:
    """Return `tx`, or raise if it is not a gradient transformation."""
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise TypeError(
            f"`tx` must be a gradient transformation, got {tx!r}. Pass what a function"
            " such as `efcp_jax.mfac(0.1)` returns."
        )
    return tx


def _reject_tracer(name: str, value: Any) -> None:
    if isinstance(value, jax.Array | Tracer):
        raise TypeError(
            f"`{name}` shapes the optimizer state, so it must be a Python value known"
            f" before tracing, got {value!r}. Under `optax.inject_hyperparams` name it"
            f" in `static_args`, for example `static_args=('{name}',)`."
        )

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


def _reject_tracer(name: str, value: Any) -> None:
    if isinstance(value, (jax.Array, Tracer)):
        raise TypeError(
            f"`{name}` shapes the optimizer state, so it must be a Python value known"
            f" before tracing, got {value!r}. Under `optax.inject_hyperparams` name it"
            f" in `static_args`, for example `static_args=('{name}',)`."
        )


def positive_int(name: str, value: Any) -> int:
    """Return `value` as an int, or raise if it is not an integer of at least 1."""
    _reject_tracer(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be an integer >= 1, got {value!r} of type"
            f" {type(value).__name__}. Pass a whole number such as `{name}=32`."
        )
    if value < 1:
        raise ValueError(
            f"`{name}` must be an integer >= 1, got {value}. Pass at least `{name}=1`."
        )
    return int(value)


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float, or raise if it lies outside (0, 1]."""
    _reject_tracer(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`{name}` must be a number in (0, 1], got {value!r} of type"
            f" {type(value).__name__}. Pass a fraction such as `{name}=0.01`."
        )
    if not 0.0 < float(value) <= 1.0:
        raise ValueError(
            f"`{name}` must be in (0, 1], got {value}. To keep one entry in a hundred"
            f" pass `{name}=0.01`; to keep all of them pass `{name}=1.0`."
        )
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """Return `value`, or raise if it is not a Python bool."""
    _reject_tracer(name, value)
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def floating_dtype(name: str, value: Any) -> np.dtype | None:
    """Return `value` as a dtype, or raise if it is no real one of 16 bits or more."""
    if value is None:
        return None
    dtype = _dtype(name, value)
    if not _is_wide(dtype):
        narrow = (
            " Values of 8 bits there are for `value_dtype` of `top_k` only."
            if dtype.itemsize == 1
            else ""
        )
        raise ValueError(
            f"`{name}` must be a real floating dtype of at least 16 bits, got {dtype}."
            f" Pass jnp.float32 or jnp.bfloat16.{narrow}"
        )
    return dtype


def stored_dtype(
    name: str,
    value: Any,
    narrow: tuple[str, ...],
    fits: bool = True,
    remedy: str = "",
) -> np.dtype | None:
    """Return `value` as a dtype, or raise if entries cannot be stored in it.

    Args:
        name: The argument.
        value: What was passed; None stands for itself.
        narrow: Names of the dtypes of 8 bits that there are.
        fits: Whether they may be used.
        remedy: Why not, and what to do.
    """
    if value is None:
        return None
    dtype = _dtype(name, value)
    if not _is_wide(dtype) and dtype.name not in narrow:
        options = ", ".join(f"jnp.{each}" for each in ("bfloat16", *narrow))
        raise ValueError(
            f"`{name}` must be a real floating dtype of at least 16 bits or"
            f" {' or '.join(narrow)}, got {dtype}. Pass one of jnp.float32, {options}."
        )
    if not _is_wide(dtype) and not fits:
        raise ValueError(f"`{name}` must not be {dtype} here. {remedy}")
    return dtype


def error_dtype(value: Any) -> np.dtype | None:
    """Return `value` as a dtype, or raise if no error can be kept in it."""
    return stored_dtype("error_dtype", value, ("int8",))


def _dtype(name: str, value: Any) -> np.dtype:
    try:
        return jnp.dtype(value)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be a floating dtype such as jnp.bfloat16, got {value!r}."
        ) from error


def _is_wide(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return `value`, or raise if it is not one of the `allowed` strings."""
    if not isinstance(value, str) or value not in allowed:
        options = " or ".join(repr(option) for option in allowed)
        raise ValueError(f"`{name}` must be {options}, got {value!r}.")
    return value


def number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    remedy: str,
) -> Any:
    """Return `value`, or raise if it is concrete and outside its interval.

    Schedules and tracers pass: their values are not known here.
    """
    if callable(value) or isinstance(value, Tracer):
        return value
    interval = (
        f"{'(' if open_low else '['}{low:g}, {high:g}"
        f"{')' if open_high or math.isinf(high) else ']'}"
    )
    is_array = isinstance(value, (jax.Array, np.ndarray, np.generic))
    if isinstance(value, bool) or not (is_array or isinstance(value, numbers.Real)):
        raise TypeError(
            f"`{name}` must be a number in {interval} or a schedule, got {value!r} of"
            f" type {type(value).__name__}. {remedy}"
        )
    real = is_array and (
        jnp.issubdtype(value.dtype, jnp.floating)
        or jnp.issubdtype(value.dtype, jnp.integer)
    )
    if is_array and (value.ndim or not real):
        raise TypeError(
            f"`{name}` must be a scalar in {interval} or a schedule, got an array of"
            f" shape {value.shape} and dtype {value.dtype}. {remedy}"
        )
    concrete = float(value)
    above = concrete > low or (concrete == low and not open_low)
    below = concrete < high or (concrete == high and not open_high)
    if not (math.isfinite(concrete) and above and below):
        raise ValueError(f"`{name}` must be in {interval}, got {concrete}. {remedy}")
    return value


def number_now(name: str, value: Any, **interval: Any) -> float:
    """Return `value` as a float, or raise; no schedule, and nothing traced."""
    _reject_tracer(name, value)
    if callable(value):
        raise TypeError(
            f"`{name}` must be a number, got {value!r}, a schedule."
            f" {interval['remedy']}"
        )
    return float(number(name, value, **interval))

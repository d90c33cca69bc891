"""The one place that asks which platform a pass over sparse rows runs on."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax

from efcp_jax.passes import cpu, gpu, reference, tpu


def by_platform(name: str, *arrays: Any, **static: Any) -> Any:
    """Return what the platform's own form of the pass `name` returns."""

    def form(module: Any) -> Any:
        return functools.partial(getattr(module, name), **static)

    return lax.platform_dependent(
        *arrays,
        cpu=form(cpu),
        cuda=form(gpu),
        tpu=form(tpu),
        default=form(reference),
    )


def fed(
    error: Any,
    accept: jax.Array,
    count: jax.Array,
    by_parts: Callable[..., Any],
    *,
    gradient: Callable[[], jax.Array],
    finish: Callable[[jax.Array, jax.Array], tuple[Any, jax.Array]],
    kept: int,
    lanes: int,
    dtype: Any,
) -> Any:
    """Return what `by_parts` makes of `error`, on TPUs in one pass; see `Tiles`."""

    def at_once(error: Any, accept: jax.Array, count: jax.Array) -> Any:
        values, offsets, rest = tpu.feed(error, gradient(), accept, count, kept, dtype)
        return *finish(values, offsets), rest

    forms = {"tpu": at_once} if tpu.feeds(error, dtype, lanes) else {}
    return lax.platform_dependent(error, accept, count, default=by_parts, **forms)

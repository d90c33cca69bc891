"""The one place that asks which platform a pass over sparse rows runs on."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import numpy as np

from efcp_jax import varying
from efcp_jax.passes import cpu, cpu_feed, gpu, reference, tpu
from efcp_jax.passes.entries import Storage


def by_platform(name: str, *arrays: Any, **static: Any) -> Any:
    """Return what the platform's own form of the pass `name` returns.

    A derivative is that of the plain form: kernels have none, and loops would keep what
    they have seen.
    """

    def form(module: Any) -> Any:
        call = functools.partial(getattr(module, name), **static)
        return lambda *arrays: varying.like(arrays, call(*arrays))

    @jax.custom_jvp
    def run(*arrays: Any) -> Any:
        return lax.platform_dependent(
            *arrays,
            cpu=form(cpu),
            cuda=form(gpu),
            tpu=form(tpu),
            default=form(reference),
        )

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        made = run(*primals)
        if name == "select":
            # Which entries are largest is a constant, but where two are equal.
            plain = functools.partial(reference.take, offsets=made[1])
        else:
            plain = form(reference)
        return made, jax.jvp(plain, primals, tangents)[1]

    return run(*arrays)


def fed(
    form: Any,
    tree: Any,
    error: Any,
    accept: jax.Array,
    count: jax.Array,
    by_parts: Callable[..., Any],
    *,
    gradient: Callable[[Any], jax.Array],
    sections: Callable[[Any], Any],
    finish: Callable[[jax.Array, jax.Array], tuple[Any, jax.Array]],
    storage: Storage,
    dtype: np.dtype,
) -> tuple[Any, jax.Array, Any]:
    """Return the row and the scale of `error` plus a gradient, and what is left.

    Args:
        form: `Tiles` or `LargeBlocks`.
        tree: What the gradient is made from.
        error: Shape `(blocks, size)`, as it is kept.
        accept: Whether to add the gradient and to take anything away.
        count: The number of the step, for rounding.
        by_parts: From these four to the result, one pass over everything after the
            other. A derivative is that of this form.
        gradient: Makes the gradient, shape `(blocks, size)`, for TPUs, which do all in
            one pass.
        sections: Makes what reads it in parts, for CPUs, which do so where the error is
            narrow.
        finish: From the values of a row, rounded, and its offsets to the row as it
            is stored, and its scale.
        storage: How values are stored.
        dtype: The working dtype.

    Returns:
        The row as it is stored, its scale and the new error.
    """

    def at_once(tree: Any, error: Any, accept: jax.Array, count: jax.Array) -> Any:
        step = accept, count, form.kept, storage.values
        *row, rest = tpu.feed(error, gradient(tree), *step)
        return *finish(*row), rest

    def in_rounds(tree: Any, error: Any, accept: jax.Array, count: jax.Array) -> Any:
        given = {"form": form, "sections": sections(tree), "storage": storage}
        *row, rest = cpu_feed.feed(error, accept, count, **given)
        return *finish(*row), rest

    forms = {}
    if tpu.feeds(error, storage.values, form.lanes):
        forms["tpu"] = at_once
    if cpu_feed.feeds(form, error, storage, dtype):
        forms["cpu"] = in_rounds
    run = jax.custom_jvp(
        lambda *given: lax.platform_dependent(*given, default=by_parts, **forms)
    )
    run.defjvp(functools.partial(jax.jvp, by_parts))
    return run(tree, error, accept, count)

"""One step of each transformation, on the vectors and rows of one device.

A preconditioned step: compress with feedback, insert the row and take its inner
products, replace them in the Gram matrix, solve for coefficients, combine the rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from efcp_jax import _validate, feedback_input, passes, quantized, window as windows
from efcp_jax.compressors import (
    Compressor,
    Space,
    each_gram,
    identity,
    of_grams,
    scoped,
)
from efcp_jax.metrics import Metric
from efcp_jax.metrics.base import optional
from efcp_jax.preconditioners import gram as grams
from efcp_jax.protocol import transformation
from efcp_jax.states import ErrorFeedbackState
from efcp_jax.window import Window


# Default number of rows, for every transformation and alias.
WINDOW_SIZE = 64

# Returns the coefficients of the stored rows, and what to keep, from the Gram matrix,
# what was kept, the window behind the insertion, the slot of the newest row and the
# values of the hyperparameters.
_Coefficients = Callable[..., tuple[Any, ...]]


def compressed(
    *,
    compressor: Compressor | None,
    metric: Metric | None,
    error_dtype: jax.typing.DTypeLike | None,
    skip_nonfinite: bool,
    sharding: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that emits $c_t$; arguments as `error_feedback`."""
    compressor, metric = _compressor(compressor), optional(metric)
    error_dtype = _validate.error_dtype(error_dtype)
    skip_nonfinite = _validate.boolean("skip_nonfinite", skip_nonfinite)

    def init(space: Space) -> ErrorFeedbackState:
        vector, _, basis = space.zeros()
        count = jnp.zeros((), jnp.int32)
        return ErrorFeedbackState(
            count=count,
            skipped=jnp.zeros_like(count),
            error=quantized.zeros(vector, space.specs()[0], error_dtype),
            basis=basis,
            metric=metric.init(space.layout) if metric else None,
        )

    def specs(space: Space) -> ErrorFeedbackState:
        vector, _, basis = space.specs()
        one: Any = PartitionSpec()
        return ErrorFeedbackState(
            count=one,
            skipped=one,
            error=quantized.specs(vector, error_dtype),
            basis=basis,
            metric=metric.specs(space.layout) if metric else None,
        )

    def step(space: Space, updates, state: ErrorFeedbackState, values):
        del values
        layout = space.layout
        new = feedback_input.take(space, updates, state, metric, skip_nonfinite)
        accept, share = jnp.asarray(True), new.share
        if skip_nonfinite:
            fault = jnp.where(new.finite, 0, 1).astype(layout.dtype)
            faults, share = layout.sum((fault, share))
            accept = faults == 0
        elif share is not None:
            share = layout.sum(share)

        def update(scale: jax.Array) -> Any:
            scaled = lambda c: jnp.where(accept, c * scale, 0)
            return space.unpack(jax.tree.map(scaled, space.expand(new.row.row)))

        return new.outward(update, new.row.scale), ErrorFeedbackState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            skipped=_count_skipped(state.skipped, accept),
            error=new.error(accept, state.error),
            basis=feedback_input.select(accept, new.row.basis, state.basis),
            metric=new.metric(accept, share, state.metric),
        )

    return transformation(compressor, init, specs, step, {}, sharding)


def preconditioned(
    state_type: type,
    coefficients: _Coefficients,
    keep: Callable[[int, Any], Any],
    hyperparameters: dict[str, Any],
    *,
    window_size: int | None,
    compressor: Compressor | None,
    block_diagonal: bool,
    metric: Metric | None,
    error_feedback: bool,
    error_dtype: jax.typing.DTypeLike | None,
    skip_nonfinite: bool,
    sharding: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation with the coefficients of either preconditioner."""
    compressor, metric = _compressor(compressor), optional(metric)
    block_diagonal = _validate.boolean("block_diagonal", block_diagonal)
    compressor = scoped(compressor, block_diagonal)
    size = WINDOW_SIZE
    if window_size is not None:
        size = _validate.positive_int("window_size", window_size)
    # A compressor that drops nothing leaves an error of zero, not worth its memory.
    error_feedback = _validate.boolean("error_feedback", error_feedback)
    error_feedback = error_feedback and not compressor.lossless
    error_dtype = _validate.error_dtype(error_dtype)
    skip_nonfinite = _validate.boolean("skip_nonfinite", skip_nonfinite)

    def init(space: Space):
        vector, _, basis = space.zeros()
        count = jnp.zeros((), jnp.int32)
        dtype = space.layout.dtype
        copies = lambda value: jax.tree.map(jnp.copy, of_grams(space.counts, value))
        return state_type(
            count=count,
            skipped=jnp.zeros_like(count),
            error=quantized.zeros(vector, space.specs()[0], error_dtype)
            if error_feedback
            else None,
            basis=basis,
            window=windows.empty(space, size, dtype),
            gram=copies(jnp.zeros((size, size), dtype)),
            factor=copies(keep(size, dtype)),
            metric=metric.init(space.layout) if metric else None,
        )

    def specs(space: Space):
        vector, row, basis = space.specs()
        one: Any = PartitionSpec()
        factor = jax.eval_shape(lambda: keep(size, space.layout.dtype))
        return state_type(
            count=one,
            skipped=one,
            error=quantized.specs(vector, error_dtype) if error_feedback else None,
            basis=basis,
            window=Window(rows=row, scale=one, slot=one, filled=one),
            gram=of_grams(space.counts, one),
            factor=of_grams(space.counts, jax.tree.map(lambda _: one, factor)),
            metric=metric.specs(space.layout) if metric else None,
        )

    def step(space: Space, updates, state, values):
        layout, slot = space.layout, state.window.slot
        new = feedback_input.take(space, updates, state, metric, skip_nonfinite)
        accept, window = jnp.asarray(True), state.window
        row, scale = new.row.row, new.row.scale
        multiply = lambda rows: space.inner(rows, row)

        if not layout.axes:
            # The row is inserted first: all reading behind the writing needs no copy.
            accept = new.finite if skip_nonfinite else accept
            window = windows.insert(window, row, scale, accept)
            products = multiply(window.rows)
        else:
            products = windows.products(multiply, window, row)
        # A device that met an entry that is not finite tells the others in the sum.
        products = jax.tree.map(lambda k: jnp.where(new.finite, k, jnp.nan), products)
        products, share = layout.sum((products, new.share))
        if layout.axes:
            if skip_nonfinite:
                accept = new.finite & passes.all_finite(jax.tree.leaves(products))
            window = windows.insert(window, row, scale, accept)
        replace = lambda old, row: grams.replace(old, row, slot, accept)
        gram = jax.tree.map(replace, state.gram, products)
        solve = lambda k, kept: coefficients(k, kept, window, slot, values)
        # Large systems keep the cores busy one by one, and their branches apart.
        large = bool(jax.tree.leaves(state.factor))
        solved = each_gram(solve, in_turn=large)(gram, state.factor)
        part = lambda i: jax.tree.map(lambda _, new: new[i], gram, solved)
        chosen = jax.tree.map(lambda x: jnp.where(accept, x, 0), part(0))
        update = lambda weights: space.update(window.rows, weights)
        return new.outward(update, chosen), state_type(
            count=optax.safe_increment(state.count),
            skipped=_count_skipped(state.skipped, accept),
            error=new.error(accept, state.error),
            basis=feedback_input.select(accept, new.row.basis, state.basis),
            window=window,
            gram=gram,
            factor=part(1),
            metric=new.metric(accept, share, state.metric),
        )

    return transformation(compressor, init, specs, step, hyperparameters, sharding)


def _compressor(compressor: Compressor | None) -> Compressor:
    if compressor is None:
        return identity()
    if not isinstance(compressor, Compressor):
        raise TypeError(
            "`compressor` must be a compressor, got"
            f" {compressor!r}. Pass `efcp_jax.identity()`, `efcp_jax.top_k(0.01)` or"
            " `efcp_jax.low_rank(4)`."
        )
    return compressor


def _count_skipped(skipped: jax.Array, accept: jax.Array) -> jax.Array:
    return jnp.where(accept, skipped, optax.safe_increment(skipped))

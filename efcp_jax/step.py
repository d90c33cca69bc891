"""One step of a preconditioned transformation, on the vectors and rows of one device.

Compress with feedback, insert the row into the window and take its inner products,
replace them in the Gram matrix, solve for coefficients, combine the rows.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from efcp_jax import _validate, passes
from efcp_jax.compressors import (
    Compressor,
    Space,
    each_gram,
    identity,
    of_grams,
    scoped,
)
from efcp_jax.feedback import Feedback, Taken, Window
from efcp_jax.metrics import required
from efcp_jax.preconditioners import gram as grams
from efcp_jax.protocol import Step


# Default number of rows, for every transformation and alias.
WINDOW_SIZE = 64


def checked(
    compressor: Any,
    metric: Any,
    error_dtype: Any,
    skip_nonfinite: Any,
    error_feedback: Any = True,
    block_diagonal: Any = False,
) -> Feedback:
    """Return how gradients enter a step, or raise if an argument is not right."""
    if compressor is None:
        compressor = identity()
    if not isinstance(compressor, Compressor):
        raise TypeError(
            "`compressor` must be a compressor, got"
            f" {compressor!r}. Pass `efcp_jax.identity()`, `efcp_jax.top_k(0.01)` or"
            " `efcp_jax.low_rank(4)`."
        )
    block_diagonal = _validate.boolean("block_diagonal", block_diagonal)
    return Feedback(
        compressor=scoped(compressor, block_diagonal),
        metric=None if metric is None else required(metric),
        error=_validate.boolean("error_feedback", error_feedback),
        error_dtype=_validate.floating_dtype("error_dtype", error_dtype, ("int8",)),
        skip_nonfinite=_validate.boolean("skip_nonfinite", skip_nonfinite),
    )


def preconditioned(
    state_type: type,
    coefficients: Callable[..., tuple[Any, Any]],
    keep: Callable[[int, Any], Any],
    hyperparameters: dict[str, Any],
    window_size: int | None,
    feedback: Feedback,
    sharding: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation with the coefficients of either preconditioner.

    These are made, with what to keep, of the Gram matrix, what was kept, the window
    behind the insertion, the slot of the newest row and values of the hyperparameters;
    `keep` returns what is kept at first, of a window size and dtype.
    """
    # A compressor that drops nothing leaves an error of zero, not worth its memory.
    error = feedback.error and not feedback.compressor.lossless
    feedback = dataclasses.replace(feedback, error=error)
    size = WINDOW_SIZE if window_size is None else window_size
    size = _validate.positive_int("window_size", size)
    made = _Preconditioned(state_type, coefficients, keep, size, feedback)
    given = made.init, made.specs, made.step, hyperparameters, sharding
    return Step(feedback.compressor, *given).transformation


@dataclasses.dataclass(frozen=True)
class _Preconditioned:
    """The functions of the step, and what they have in common."""

    state_type: type
    coefficients: Callable[..., tuple[Any, Any]]
    keep: Callable[[int, Any], Any]
    size: int
    feedback: Feedback

    def init(self, space: Space) -> Any:
        size, dtype = self.size, space.layout.dtype
        copies = lambda value: jax.tree.map(jnp.copy, of_grams(space.counts, value))
        return self.state_type(
            **self.feedback.init(space),
            window=Window.empty(space, size, dtype),
            gram=copies(jnp.zeros((size, size), dtype)),
            factor=copies(self.keep(size, dtype)),
        )

    def specs(self, space: Space) -> Any:
        one: Any = PartitionSpec()
        factor = jax.eval_shape(lambda: self.keep(self.size, space.layout.dtype))
        return self.state_type(
            **self.feedback.specs(space),
            window=Window.specs(space),
            gram=of_grams(space.counts, one),
            factor=of_grams(space.counts, jax.tree.map(lambda _: one, factor)),
        )

    def step(self, space: Space, updates: Any, state: Any, values: dict) -> Any:
        slot = state.window.slot
        new = self.feedback.take(space, updates, state)
        window, accept, products, share = self._insert(space, state.window, new)
        replace = lambda old, row: grams.replace(old, row, slot, accept)
        gram = jax.tree.map(replace, state.gram, products)
        solve = lambda k, kept: self.coefficients(k, kept, window, slot, values)
        # Large systems keep the cores busy one by one, and their branches apart.
        large = bool(jax.tree.leaves(state.factor))
        solved = each_gram(solve, in_turn=large)(gram, state.factor)
        part = lambda i: jax.tree.map(lambda _, new: new[i], gram, solved)
        chosen = jax.tree.map(lambda x: jnp.where(accept, x, 0), part(0))
        update = lambda weights: space.update(window.rows, weights)
        return new.outward(update, chosen), self.state_type(
            **new.kept(accept, share, state), window=window, gram=gram, factor=part(1)
        )

    def _insert(self, space: Space, window: Window, new: Taken) -> tuple[Any, ...]:
        """Return the window, whether to accept, products, and the mean of moments."""
        layout, accept = space.layout, jnp.asarray(True)
        multiply = lambda rows: space.inner(rows, new.row)
        if not layout.axes:
            # The row is inserted first: all reading behind the writing needs no copy.
            accept = new.finite if self.feedback.skip_nonfinite else accept
            window = window.insert(new.row, new.scale, accept)
            products = multiply(window.rows)
        else:
            products = window.products(multiply, new.row)
        # A device that met an entry that is not finite tells the others in the sum.
        products = jax.tree.map(lambda k: jnp.where(new.finite, k, jnp.nan), products)
        products, share = layout.sum((products, new.share))
        if layout.axes:
            if self.feedback.skip_nonfinite:
                accept = new.finite & passes.all_finite(jax.tree.leaves(products))
            window = window.insert(new.row, new.scale, accept)
        return window, accept, products, share

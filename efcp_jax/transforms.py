"""The gradient transformations: error feedback, M-FAC and GGT.

A step of either preconditioner is five lines of `_step`: compress with feedback, take
the new row of the Gram matrix, insert, solve, combine.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import chex
import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from efcp_jax import _validate, feedback, gram as grams, placement, window as windows
from efcp_jax.compressors import Compressor, Space, identity
from efcp_jax.preconditioners import ggt_coefficients, mfac_coefficients
from efcp_jax.window import Window


# Default number of rows, for every transformation and alias.
WINDOW_SIZE = 64


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
        count: Number of updates, int32.
        skipped: Number of updates skipped for entries that were not finite, int32.
        error: What compression has dropped so far, in working form.
        basis: What the compressor carries between steps, or None.
    """

    count: jax.Array
    skipped: jax.Array
    error: chex.ArrayTree
    basis: chex.ArrayTree | None


class ScaleByMfacState(NamedTuple):
    """State of `scale_by_mfac`.

    Attributes:
        count: Number of updates, int32.
        skipped: Number of updates skipped for entries that were not finite, int32.
        error: What compression has dropped so far, in working form; None without error
            feedback.
        basis: What the compressor carries between steps, or None.
        window: The last m compressed gradients.
        gram: Inner products of the window's stored rows, shape `(m, m)`; a tree of such
            matrices where the compressor is block diagonal.
    """

    count: jax.Array
    skipped: jax.Array
    error: chex.ArrayTree | None
    basis: chex.ArrayTree | None
    window: Window
    gram: chex.ArrayTree


class ScaleByGgtState(NamedTuple):
    """State of `scale_by_ggt`; the fields are those of `ScaleByMfacState`."""

    count: jax.Array
    skipped: jax.Array
    error: chex.ArrayTree | None
    basis: chex.ArrayTree | None
    window: Window
    gram: chex.ArrayTree


# Returns the coefficients of the stored rows from the Gram matrix, the window behind
# the insertion, the slot of the newest row and the values of the hyperparameters.
_Coefficients = Callable[[jax.Array, Window, jax.Array, dict[str, Any]], jax.Array]


def error_feedback(
    compressor: Compressor | None = None,
    *,
    error_dtype: jax.typing.DTypeLike | None = None,
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Compress the gradient and add what was dropped to the next one.

    $a_t = e_t + g_t$, emitted $c_t = C(a_t)$, $e_{t+1} = a_t - c_t$, $e_0 = 0$.

    Put it in front of any optimizer to train on compressed gradients.

    Args:
        compressor: `identity()`, `top_k(...)` or `low_rank(...)`. None is `identity()`.
        error_dtype: Floating dtype in which the error is kept. None keeps it in the
            working dtype (float32, or float64 for float64 parameters), in which no part
            of a gradient is lost; `jnp.bfloat16` halves it and loses its rounding.
        skip_nonfinite: Whether a gradient with an entry that is not finite leaves the
            error as it is and emits zeros. False lets such entries through.
        sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for
            every leaf, as a tree prefix. None takes it from the arrays' types under
            Explicit mesh axes, and computes on one device otherwise.

    Returns:
        A gradient transformation with an `ErrorFeedbackState`.

    Raises:
        TypeError: An argument is of the wrong type, or traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp, optax
        >>> tx = optax.chain(efcp_jax.error_feedback(efcp_jax.top_k(0.25)),
        ...                  optax.sgd(1.0))
        >>> params = jnp.zeros(4)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jnp.array([4., 3., 1., 1.]), state, params)
        >>> print(updates)
        [-4. -0. -0. -0.]
        >>> updates, state = tx.update(jnp.array([0., 3., 1., 1.]), state, params)
        >>> print(updates)
        [-0. -6. -0. -0.]

    References:
        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        Memory: the error, 4 bytes a parameter. Time: one compression.
    """
    compressor = _compressor(compressor)
    error_dtype = _validate.floating_dtype("error_dtype", error_dtype)
    skip_nonfinite = _validate.boolean("skip_nonfinite", skip_nonfinite)

    def init(space: Space) -> ErrorFeedbackState:
        vector, _, basis = space.zeros()
        error = jax.tree.map(lambda e: e.astype(error_dtype or e.dtype), vector)
        count = jnp.zeros((), jnp.int32)
        return ErrorFeedbackState(count, jnp.zeros_like(count), error, basis)

    def specs(space: Space) -> ErrorFeedbackState:
        vector, _, basis = space.specs()
        one: Any = PartitionSpec()
        return ErrorFeedbackState(one, one, vector, basis)

    def step(space: Space, updates, state: ErrorFeedbackState, values):
        del values
        layout = space.layout
        new = feedback.compress(
            space, space.pack(updates), state.error, state.basis, scaled=not layout.axes
        )
        accept = jnp.asarray(True)
        if skip_nonfinite:
            accept = layout.sum(jnp.where(new.finite, 0, 1)) == 0
        update = jax.tree.map(lambda c: jnp.where(accept, c, 0), new.vector)
        return space.unpack(update), ErrorFeedbackState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            skipped=_count_skipped(state.skipped, accept),
            error=_select(accept, new.error, state.error),
            basis=_select(accept, new.basis, state.basis),
        )

    return _transformation(compressor, init, specs, step, {}, sharding)


def scale_by_mfac(
    window_size: int | None = None,
    damping: optax.ScalarOrSchedule = 1e-2,
    *,
    compressor: Compressor | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    divisor: str = "window_size",
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale by the inverse of the damped empirical Fisher matrix of the last rows.

    $u = (\lambda I + G^T G / m)^{-1} c_t$, where the rows of $G$ are the last $m$
    compressed gradients and $c_t$ is the newest.

    Args:
        window_size: Number of gradients $m$ kept, at least 1; None for 64.
        damping: $\lambda > 0$, in the unit of a squared gradient entry; a number or a
            schedule. Large values give $c_t / \lambda$, a plain gradient. For values
            that go to 0, $\langle u, c_t \rangle$ goes to $m$, so the learning rate
            belongs near $1 / m$.
        compressor: `identity()`, `top_k(...)` or `low_rank(...)`. None is `identity()`.
        error_feedback: Whether what the compressor drops is added to the next gradient.
            Switch it off behind `error_feedback(compressor)` in a chain.
        error_dtype: Floating dtype in which the error is kept; None for the working
            dtype (float32, or float64 for float64 parameters).
        divisor: `"window_size"` averages the Fisher matrix over $m$ rows from the
            first step on, as published; `"filled"` over the rows there are, which makes
            the first steps shorter by up to $m$ times.
        skip_nonfinite: Whether a gradient with an entry that is not finite is skipped:
            a zero update, an unchanged error and window, and `skipped` counted up.
        sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for
            every leaf, as a tree prefix. None takes it from the arrays' types under
            Explicit mesh axes, and computes on one device otherwise.

    Returns:
        A gradient transformation with a `ScaleByMfacState`. Its updates point up the
        gradient and carry no learning rate.

    Raises:
        TypeError: An argument is of the wrong type, or a structural one is traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp
        >>> tx = efcp_jax.scale_by_mfac(window_size=2, damping=1.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> updates, state = tx.update(jnp.array([2., 0.]), state)
        >>> print(f"{updates[0]:.4f}")  # 2 / (1 + 2^2 / 2)
        0.6667

    References:
        Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
        Information <https://arxiv.org/abs/2107.03356>`_, 2021

        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        Memory: the window (m times the compressed gradient), the error and m^2 numbers.
        Time: one compression, two passes over the window and m^3 / 3 operations.
        Accuracy: the relative error is the rounding unit times the condition number of
        $\lambda I + K / m$ scaled to unit diagonal; nearly dependent rows with tiny
        $\lambda$ are treated as dependent from about 1e6 on in float32.
    """
    damping = _validate.number(
        "damping",
        damping,
        low=0.0,
        open_low=True,
        remedy="Pass a small number such as 1e-5.",
    )
    divisor = _validate.choice("divisor", divisor, ("window_size", "filled"))

    def coefficients(gram, window: Window, slot, values):
        size = window.scale.shape[0]
        rows = window.filled.astype(gram.dtype) if divisor == "filled" else size
        return mfac_coefficients(gram, window.scale, slot, values["damping"], rows)

    return _preconditioner(
        ScaleByMfacState,
        coefficients,
        {"damping": damping},
        window_size=window_size,
        compressor=compressor,
        error_feedback=error_feedback,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )


def scale_by_ggt(
    window_size: int | None = None,
    eps: optax.ScalarOrSchedule = 1e-4,
    *,
    b1: chex.Numeric = 0.0,
    b2: chex.Numeric = 1.0,
    compressor: Compressor | None = None,
    error_feedback: bool = True,
    error_dtype: jax.typing.DTypeLike | None = None,
    skip_nonfinite: bool = True,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale by the inverse root of the second moment of the last rows.

    $u = ((\tilde G^T \tilde G)^{1/2} + \epsilon I)^{-1} \sum_i (1 - b_1) b_1^{age_i}
    g_i$, full-matrix Adagrad, where the rows of $\tilde G$ are the last $m$ compressed
    gradients $g_i$ times $b_2^{age_i}$. With the defaults, $u = ((G^T G)^{1/2} +
    \epsilon I)^{-1} c_t$.

    Args:
        window_size: Number of gradients $m$ kept, at least 1; None for 64.
        eps: $\epsilon \ge 0$, added to every singular value of the window, in the unit
            of a gradient norm; a number or a schedule. Large values give
            $c_t / \epsilon$, a plain gradient; 0 gives the pseudo-inverse. For values
            that go to 0 the update is at most 1 long, so the learning rate belongs
            near 1.
        b1: Decay of the first moment, in [0, 1), at most `b2`. It needs no momentum
            buffer: the moment is taken over the window. 0 takes the newest row.
        b2: Decay of the older rows of the window, in (0, 1]. 1 keeps them as they are.
        compressor: `identity()`, `top_k(...)` or `low_rank(...)`. None is `identity()`.
        error_feedback: Whether what the compressor drops is added to the next gradient.
            Switch it off behind `error_feedback(compressor)` in a chain.
        error_dtype: Floating dtype in which the error is kept; None for the working
            dtype (float32, or float64 for float64 parameters).
        skip_nonfinite: Whether a gradient with an entry that is not finite is skipped:
            a zero update, an unchanged error and window, and `skipped` counted up.
        sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for
            every leaf, as a tree prefix. None takes it from the arrays' types under
            Explicit mesh axes, and computes on one device otherwise.

    Returns:
        A gradient transformation with a `ScaleByGgtState`. Its updates point up the
        gradient and carry no learning rate.

    Raises:
        TypeError: An argument is of the wrong type, or a structural one is traced.
        ValueError: An argument is out of range.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp
        >>> tx = efcp_jax.scale_by_ggt(window_size=2, eps=1.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> updates, state = tx.update(jnp.array([3., 0.]), state)
        >>> print(f"{updates[0]:.4f}")  # 3 / (3 + 1)
        0.7500

    References:
        Agarwal et al., `Efficient Full-Matrix Adaptive Regularization
        <https://arxiv.org/abs/1806.02958>`_, 2019

        Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
        <https://arxiv.org/abs/2306.06098>`_, 2024

    Notes:
        Memory: the window (m times the compressed gradient), the error and m^2 numbers.
        Time: one compression, two passes over the window and an eigendecomposition of
        an `(m, m)` matrix, about 10 m^3 operations.
        Accuracy: singular values below 3e-4 of the largest are not resolved in float32.
    """
    eps = _validate.number(
        "eps", eps, low=0.0, remedy="Pass a small number such as 1e-4."
    )
    b1 = _validate.number(
        "b1", b1, low=0.0, high=1.0, open_high=True, remedy="Pass 0.0 for no momentum."
    )
    b2 = _validate.number(
        "b2", b2, low=0.0, high=1.0, open_low=True, remedy="Pass 1.0 for no decay."
    )
    concrete = not any(isinstance(each, Tracer) for each in (b1, b2))
    if concrete and not callable(b1) and not callable(b2) and b1 > b2:
        raise ValueError(
            f"`b1` must be at most `b2`, got b1={b1} and b2={b2}: the first moment"
            " would reach further back than the rows it is taken over. Lower `b1` or"
            " raise `b2`."
        )

    def coefficients(gram, window: Window, slot, values):
        age = grams.ages(window.scale.shape[0], slot)
        return ggt_coefficients(
            gram,
            window.scale,
            age,
            window.filled,
            values["eps"],
            values["b1"],
            values["b2"],
        )

    return _preconditioner(
        ScaleByGgtState,
        coefficients,
        {"eps": eps, "b1": b1, "b2": b2},
        window_size=window_size,
        compressor=compressor,
        error_feedback=error_feedback,
        error_dtype=error_dtype,
        skip_nonfinite=skip_nonfinite,
        sharding=sharding,
    )


def _preconditioner(
    state_type: type,
    coefficients: _Coefficients,
    hyperparameters: dict[str, Any],
    *,
    window_size: int | None,
    compressor: Compressor | None,
    error_feedback: bool,
    error_dtype: jax.typing.DTypeLike | None,
    skip_nonfinite: bool,
    sharding: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that both preconditioners share."""
    compressor = _compressor(compressor)
    size = WINDOW_SIZE
    if window_size is not None:
        size = _validate.positive_int("window_size", window_size)
    # A compressor that drops nothing leaves an error of zero, not worth its memory.
    error_feedback = _validate.boolean("error_feedback", error_feedback)
    error_feedback = error_feedback and not compressor.lossless
    error_dtype = _validate.floating_dtype("error_dtype", error_dtype)
    skip_nonfinite = _validate.boolean("skip_nonfinite", skip_nonfinite)

    def init(space: Space):
        vector, _, basis = space.zeros()
        error = jax.tree.map(lambda e: e.astype(error_dtype or e.dtype), vector)
        count = jnp.zeros((), jnp.int32)
        dtype = space.layout.dtype
        return state_type(
            count=count,
            skipped=jnp.zeros_like(count),
            error=error if error_feedback else None,
            basis=basis,
            window=windows.empty(space, size, dtype),
            gram=jax.tree.map(jnp.copy, space.grams(jnp.zeros((size, size), dtype))),
        )

    def specs(space: Space):
        vector, row, basis = space.specs()
        one: Any = PartitionSpec()
        return state_type(
            count=one,
            skipped=one,
            error=vector if error_feedback else None,
            basis=basis,
            window=Window(rows=row, scale=one, slot=one, filled=one),
            gram=space.grams(one),
        )

    def step(space: Space, updates, state, values):
        layout, slot = space.layout, state.window.slot
        # On one device it is known before anything is changed whether to skip, and the
        # row is inserted first: all reading behind the writing needs no copy.
        guarded = skip_nonfinite and not layout.axes
        new = feedback.compress(
            space,
            space.pack(updates),
            state.error,
            state.basis,
            scaled=not layout.axes,
            guarded=guarded,
        )
        accept, window = jnp.asarray(True), state.window
        if not layout.axes:
            accept = new.finite if skip_nonfinite else accept
            window = windows.insert(window, new.row, new.scale, accept)
            products = space.inner(window.rows, new.row)
        else:
            products = windows.inner(space, window, new.row)
        # A device that met an entry that is not finite tells the others in the sum.
        products = jax.tree.map(lambda k: jnp.where(new.finite, k, jnp.nan), products)
        products = layout.sum(products)
        if layout.axes:
            if skip_nonfinite:
                finite = [jnp.all(jnp.isfinite(k)) for k in jax.tree.leaves(products)]
                accept = functools.reduce(jnp.logical_and, finite, new.finite)
            window = windows.insert(window, new.row, new.scale, accept)
        gram = jax.tree.map(
            lambda old, row: grams.replace(old, row, slot, accept),
            state.gram,
            products,
        )
        weights = jax.tree.map(lambda k: coefficients(k, window, slot, values), gram)
        weights = jax.tree.map(lambda w: jnp.where(accept, w, 0), weights)
        update = space.combine(window.rows, weights)
        error = new.error if guarded else _select(accept, new.error, state.error)
        return space.unpack(update), state_type(
            count=optax.safe_increment(state.count),
            skipped=_count_skipped(state.skipped, accept),
            error=error,
            basis=_select(accept, new.basis, state.basis),
            window=window,
            gram=gram,
        )

    return _transformation(compressor, init, specs, step, hyperparameters, sharding)


def _transformation(
    compressor: Compressor,
    init: Callable[[Space], Any],
    specs: Callable[[Space], Any],
    step: Callable[..., Any],
    hyperparameters: dict[str, Any],
    sharding: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return `init` and `step` as a transformation, on one device or spread over many.

    `init`, `specs` and `step` speak of a space; here the space is made from the tree.
    """

    def space_of(tree, dtype, placed):
        return compressor.bind(placement.layout(tree, dtype, placed))

    def init_fn(params):
        params = _strip_boxes(params)
        _validate.floating_leaves(params)
        placed = placement.find(params, sharding)
        space = space_of(params, working_dtype(params), placed)
        return placement.start(init, space, placed, specs(space))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        given = jax.tree.structure(updates)
        updates, params = _strip_boxes(updates), _strip_boxes(params)
        like = updates if params is None else params
        _validate.floating_leaves(updates, "updates")
        _validate.same_trees(updates, like)
        placed = placement.find(like, sharding)
        space = space_of(updates, _state_dtype(state), placed)
        local = jax.eval_shape(lambda: init(space))
        made = placement.global_arrays(local, specs(space), placed)
        _validate.same_state(state, made, updates)
        values = {
            name: jnp.asarray(value(state.count) if callable(value) else value)
            for name, value in hyperparameters.items()
        }
        tree_specs, state_specs = PartitionSpec(), specs(space)
        if placed is not None:
            tree_specs = jax.tree.structure(updates).unflatten(placed.specs)
            moved = placement.move(updates, placed.specs)
        else:
            moved = updates
        new_updates, new_state = placement.run(
            functools.partial(step, space),
            placed,
            (tree_specs, state_specs, {name: PartitionSpec() for name in values}),
            (tree_specs, state_specs),
            moved,
            state,
            values,
        )
        if placed is not None:
            new_updates = placement.move_like(new_updates, updates)
        return given.unflatten(jax.tree.leaves(new_updates)), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def working_dtype(tree: chex.ArrayTree) -> Any:
    """Return float64 if a leaf of `tree` is float64 or complex128, else float32."""
    wide = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    dtypes = {jnp.dtype(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)}
    return jnp.float64 if wide & dtypes else jnp.float32


def _state_dtype(state) -> Any:
    """Return the working dtype that `init` chose."""
    held = jax.tree.leaves(getattr(state, "gram", state.error))
    return jnp.result_type(held[0], jnp.float32) if held else jnp.float32


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


def _select(accept: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)


def _count_skipped(skipped: jax.Array, accept: jax.Array) -> jax.Array:
    return jnp.where(accept, skipped, optax.safe_increment(skipped))


def _strip_boxes(tree: Any) -> Any:
    """Return `tree` with variables that carry metadata replaced by their arrays.

    State made by mapping over flax's `nnx.Variable` would inherit the sharding metadata
    of the parameter, on the wrong axes.
    """
    is_box = lambda node: hasattr(node, "get_metadata") and hasattr(node, "get_value")
    return jax.tree.map(
        lambda node: node.get_value() if is_box(node) else node, tree, is_leaf=is_box
    )

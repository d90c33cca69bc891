"""Figures of the last step, kept in the state of any optimizer."""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from efcp_jax import _validate
from efcp_jax.protocol import working_dtype
from efcp_jax.reports.compare import alignment, ratio_quartiles
from efcp_jax.reports.diagnostics import diagnostics
from efcp_jax.reports.find import own_states


class MonitorState(NamedTuple):
    r"""State of `monitor`; every figure is a scalar, 0 before the first step.

    Attributes:
        monitored: Number of steps so far, int32.
        cosine: Cosine between the gradient $g$ and the descent $-u$, in [-1, 1].
        angle: The angle of that cosine, in degrees, in [0, 180].
        gradient_norm: $|g|$.
        update_norm: $|u|$.
        ratio_quartiles: Quartiles of $|u_i / g_i|$ over the coordinates with
            $g_i \ne 0$, ascending, shape `(3,)`, float32.
        effective_rank: That of `diagnostics`, of several Gram matrices the mean.
        error_ratio: That of `diagnostics`.
        inner_state: State of the optimizer that is watched.
    """

    monitored: jax.Array
    cosine: jax.Array
    angle: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    ratio_quartiles: jax.Array
    effective_rank: jax.Array
    error_ratio: jax.Array
    inner_state: Any


def monitor(
    tx: optax.GradientTransformation, *, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Watch an optimizer: keep figures of its last step in the state.

    $\cos \varphi = -\langle g, u \rangle / (|g| |u|)$ between the gradient $g$ that
    goes in and the update $u$ that comes out, which is added to the parameters: 1 is
    steepest descent, below 0 the update climbs. Around a part that carries no negative
    learning rate, such as `scale_by_mfac`, the sign is the opposite one.

    `optax.tree.get(state, name)` reads a figure by the names of `MonitorState`. Updates
    and inner state are those of `tx`.

    Args:
        tx: Any gradient transformation, usually the whole optimizer. Extra arguments
            are passed on to it.
        every: Figures are made in the first of so many steps, and kept for the others;
            at least 1.

    Returns:
        A gradient transformation with a `MonitorState`. `effective_rank` and
        `error_ratio` are 0 unless `tx` has exactly one of this package's
        preconditioners, and `error_ratio` also if nothing is fed back: NaN in their
        place would stop programs that look for NaN.

    Raises:
        TypeError: `tx` is not a gradient transformation, or `every` not an integer.
        ValueError: `every` is less than 1.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp, optax
        >>> tx = efcp_jax.monitor(efcp_jax.sparse_ggt(0.5, window_size=4, density=0.5))
        >>> params = jnp.zeros(4)
        >>> _, state = tx.update(jnp.array([3., 1., 1., 3.]), tx.init(params), params)
        >>> print(f"{optax.tree.get(state, 'angle'):.1f} degrees")
        18.4 degrees
        >>> print(f"{optax.tree.get(state, 'error_ratio'):.1f}")
        0.1

    Notes:
        A step costs about 20 reads of the gradient and the update, 15 of them of 2
        bytes an entry, and an eigendecomposition of each m x m Gram matrix:
        `every=100` makes that negligible. Under `jax.vmap` it is paid in every step.
        Memory: 2 to 4 bytes a parameter while figures are made. On a mesh only sums
        over arrays where they live.
        The angle is resolved to about 0.03 degrees in float32. A gradient with an entry
        that is not a number makes `cosine`, `angle` and `gradient_norm` NaN until
        figures are made again.
        A parameter that has the name of a figure, next to an optimizer that keeps trees
        of parameters, makes `optax.tree.get` find both; `state.angle` finds one.
    """
    if not callable(getattr(tx, "init", None)):
        raise TypeError(
            f"`tx` must be a gradient transformation, got {tx!r}. Pass what a function"
            " such as `efcp_jax.mfac(0.1)` returns."
        )
    every = _validate.positive_int("every", every)
    inner = optax.with_extra_args_support(tx)

    def init_fn(params):
        dtype = working_dtype(params)
        figures = {name: jnp.zeros((), dtype) for name in MonitorState._fields[1:-1]}
        figures["ratio_quartiles"] = jnp.zeros(3, jnp.float32)
        count = jnp.zeros((), jnp.int32)
        return MonitorState(count, **figures, inner_state=inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        new_updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        old: MonitorState = state._replace(inner_state=None)
        measure = lambda: _figures(new_updates, updates, inner_state, old)
        if every == 1:
            new = measure()
        else:
            new = lax.cond(old.monitored % every == 0, measure, lambda: old)
        count = jnp.asarray(optax.safe_increment(old.monitored))
        return new_updates, new._replace(monitored=count, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _figures(
    updates: Any, gradients: Any, inner: Any, old: MonitorState
) -> MonitorState:
    """Return the figures of one step, in the dtypes of `old`."""
    dtype = old.cosine.dtype
    aligned = alignment(gradients, updates, dtype)
    rank = ratio = jnp.zeros((), dtype)
    states = own_states(inner)
    if len(states) == 1 and hasattr(states[0], "window"):
        known = diagnostics(states[0])
        ranks = [jnp.ravel(each) for each in jax.tree.leaves(known["effective_rank"])]
        rank = jnp.mean(jnp.concatenate(ranks))
        ratio = known.get("error_ratio", ratio)
    made = old._replace(
        cosine=-aligned.cosine,
        angle=jnp.degrees(jnp.arccos(-aligned.cosine)),
        gradient_norm=aligned.norms[0],
        update_norm=aligned.norms[1],
        ratio_quartiles=ratio_quartiles(updates, gradients),
        effective_rank=rank,
        error_ratio=ratio,
    )
    return jax.tree.map(lambda new, kept: new.astype(kept.dtype), made, old)

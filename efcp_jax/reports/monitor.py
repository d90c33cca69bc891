"""Figures of the last step, kept in the state of any optimizer."""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from efcp_jax import _validate
from efcp_jax.numerics import indexed, widest
from efcp_jax.protocol import working_dtype
from efcp_jax.reports import own_states
from efcp_jax.reports.diagnostics import diagnostics, direction


# The upper 16 bits of a float32 decide, its sign, its exponent and 7 bits behind the
# leading one: numbers without a sign that they hold, as a power of two.
_BITS = 15


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
    `optax.tree.get(state, name)` reads a figure by the names of `MonitorState`.

    Args:
        tx: Any gradient transformation, usually the whole optimizer. Extra arguments
            are passed on to it.
        every: Figures are made in the first of so many steps, and kept for the others;
            at least 1.

    Returns:
        A gradient transformation with a `MonitorState`, and the updates of `tx`.
        `effective_rank` and `error_ratio` are 0 unless `tx` has exactly one of this
        package's preconditioners, and `error_ratio` also if nothing is fed back.

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
        Memory: 2 to 4 bytes a parameter while figures are made.
        The angle is resolved to about 0.03 degrees in float32. A gradient with an entry
        that is not a number makes `cosine`, `angle` and `gradient_norm` NaN until
        figures are made again.
        A parameter that has the name of a figure, next to an optimizer that keeps trees
        of parameters, makes `optax.tree.get` find both; `state.angle` finds one.
    """
    every = _validate.positive_int("every", every)
    inner = optax.with_extra_args_support(_validate.transformation(tx))

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
        due = old.monitored % every == 0
        new = measure() if every == 1 else lax.cond(due, measure, lambda: old)
        count = jnp.asarray(optax.safe_increment(old.monitored))
        return new_updates, new._replace(monitored=count, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _figures(
    updates: Any, gradients: Any, inner: Any, old: MonitorState
) -> MonitorState:
    """Return the figures of one step, in the dtypes of `old`."""
    dtype = old.cosine.dtype
    gradient_norm, g = direction(gradients, dtype)
    update_norm, u = direction(updates, dtype)
    parts = (jnp.sum((a * b.conj()).real) for a, b in zip(g, u, strict=True))
    # Norms round too, so equal directions may come out above 1.
    cosine = jnp.clip(-sum(parts, jnp.zeros((), dtype)), -1, 1)
    rank = ratio = jnp.zeros((), dtype)
    states = own_states(inner)
    if len(states) == 1 and hasattr(states[0], "window"):
        known = diagnostics(states[0])
        ranks = [jnp.ravel(each) for each in jax.tree.leaves(known["effective_rank"])]
        rank = jnp.mean(jnp.concatenate(ranks))
        ratio = known.get("error_ratio", ratio)
    made = old._replace(
        cosine=cosine,
        angle=jnp.degrees(jnp.arccos(cosine)),
        gradient_norm=gradient_norm,
        update_norm=update_norm,
        ratio_quartiles=ratio_quartiles(updates, gradients),
        effective_rank=rank,
        error_ratio=ratio,
    )
    return jax.tree.map(lambda new, kept: new.astype(kept.dtype), made, old)


def ratio_quartiles(updates: Any, gradients: Any) -> jax.Array:
    r"""Return the quartiles of $|u_i / g_i|$ over the coordinates with $g_i \ne 0$.

    The least that at least that share of the ratios do not exceed, each off by at most
    0.4%, or zeros for none. A sort would gather the parameters of a mesh everywhere.
    """
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True)
    keys = [part for pair in pairs for part in _keys(*pair)]

    @jax.vmap
    def count(limit: jax.Array) -> jax.Array:
        """Return how many keys are no larger than `limit`."""
        reached = (jnp.sum(key <= limit, dtype=jnp.int32) for key in keys)
        return sum((each.astype(jnp.float32) for each in reached), jnp.zeros(()))

    outside, every = count(jnp.array([-1, 2**_BITS - 1], jnp.int16))
    wanted = outside + jnp.array((0.25, 0.5, 0.75)) * (every - outside)

    def halve(_: jax.Array, between: tuple[jax.Array, jax.Array]):
        low, high = between
        middle = (low + high) >> 1
        reached = count(middle.astype(jnp.int16)) >= wanted
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    # Made from a count, so that they live where the results of the loop will.
    start = jnp.zeros_like(wanted, jnp.int32)
    low, _ = lax.fori_loop(0, _BITS, halve, (start, start + (2**_BITS - 1)))
    # The middle of what has these upper bits: after 15 halvings 2^15 have become one.
    middle = lax.bitcast_convert_type(low << 16 | 2**15, jnp.float32)
    return jnp.where(low >= 0x7F80, jnp.inf, jnp.where(low == 0, 0, middle))


def _keys(update: jax.Array, gradient: jax.Array) -> list[jax.Array]:
    """Return the upper bits of the ratios as int16, which order alike; -1 for none."""
    gradient = jnp.abs(gradient.astype(widest(gradient.dtype)))
    update = jnp.abs(update.astype(widest(update.dtype)))
    known = gradient > 0  # False for NaN
    ratio = update.astype(gradient.dtype) / jnp.where(known, gradient, 1)
    bits = lax.bitcast_convert_type(ratio.astype(jnp.float32), jnp.int32)
    # Division makes no sign here, but NaN may have one.
    upper = (bits >> 16) & (2**_BITS - 1)
    key = jnp.where(known, upper, -1).astype(jnp.int16)
    # In parts whose entries an index counts.
    if key.size <= indexed():
        return [key]
    flat = key.reshape(-1)
    return [flat[i : i + indexed()] for i in range(0, key.size, indexed())]

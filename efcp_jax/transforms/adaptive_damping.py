"""Damping that follows how well steps are predicted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from efcp_jax import _validate


# Of Levenberg and Marquardt, as quoted by Martens and Grosse: steps that reduce the
# value by more than this share of the prediction lower the damping, by less raise it.
_GOOD, _BAD = 0.75, 0.25


class AdaptiveDampingState(NamedTuple):
    r"""State of `adaptive_damping`.

    Attributes:
        stepped: Number of updates, int32.
        damping: $\lambda$ of the next step, float32.
        reduction_ratio: $\rho$ when the damping was last looked at, float32; 0 before.
        inner_state: State of the optimizer whose damping it is.
    """

    stepped: jax.Array
    damping: jax.Array
    reduction_ratio: jax.Array
    inner_state: Any


def adaptive_damping(
    make_tx: Callable[[jax.Array], optax.GradientTransformation],
    damping: float = 1e-2,
    *,
    every: int = 5,
    decay: float = 0.95,
    low: float = 1e-8,
    high: float = 1e2,
) -> optax.GradientTransformationExtraArgs:
    r"""Adapt the damping by the rule of Levenberg and Marquardt.

    Every $T$ steps, with the update $\delta$ and the gradient $g$ of the step,

    $$\rho = \frac{f(\theta + \delta) - f(\theta)}{\langle g, \delta \rangle}, \qquad
    \lambda \leftarrow \begin{cases} \omega^T \lambda & \rho > 3/4 \\
    \omega^{-T} \lambda & \rho < 1/4 \\ \lambda & \text{else.} \end{cases}$$

    The prediction is that of the linear model. The quadratic term of the model of
    M-FAC is $\eta / 2$ of it for a learning rate $\eta$, and $\eta$ is about $1 / m$.

    `update` takes the extra argument `value_fn`, a function from parameters to the loss
    of the batch that $g$ is the gradient of, and if it is known `value`, the loss of
    the parameters as they are.

    Args:
        make_tx: From the damping, a number or traced, to an optimizer whose updates are
            added to the parameters, such as
            `lambda damping: mfac(0.1, damping=damping)`.
        damping: $\lambda$ to start with, in `[low, high]`.
        every: $T$, steps between two looks, at least 1.
        decay: $\omega$, in (0, 1).
        low: Least damping, positive.
        high: Largest damping, at least `low`.

    Returns:
        A gradient transformation with an `AdaptiveDampingState`. Steps that are
        predicted to climb, skipped ones among them, leave the damping as it is; a value
        that is not finite raises it.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range; by `update`, `value_fn` or `params` are
            missing.

    Examples:
        >>> import efcp_jax, jax, jax.numpy as jnp, optax
        >>> tx = efcp_jax.adaptive_damping(
        ...     lambda damping: efcp_jax.mfac(0.1, window_size=2, damping=damping),
        ...     0.1, every=1, decay=0.5)
        >>> loss = lambda x: jnp.sum(x ** 2)
        >>> params = jnp.array([1., 2.])
        >>> _, state = tx.update(
        ...     jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
        >>> print(f"{optax.tree.get(state, 'damping'):.3f}")
        0.050

    References:
        Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored
        Approximate Curvature <https://arxiv.org/abs/1503.05671>`_, 2015, section 6.5

    Notes:
        Time: one or two evaluations of `value_fn` in T steps; under `jax.vmap` in each.
        From windows of 512 rows on, a change of the damping is a factorisation anew.
        Measured, it does not beat a damping that is chosen well, and is not a default.
        Median loss of three seeds, m = 32, learning rate 1/32 decayed along a cosine,
        dense and sparse M-FAC, started from 1e-1, 1e-2, 1e-3, 1e-4 and 1e-5:

        * digits, 600 steps: 1.6e-3 to 1.9e-2 and 3.7e-4 to 5.8e-4. Constant: 2.7e-4 to
          1.3e-1 and 3.0e-4 to 1.5e-1.
        * regression on a sine, 1500 steps: 2.5e-2 to 3.5e-2 and 1.3e-2 to 1.6e-2.
          Constant: 3.1e-3 to 3.8e-2 and 6.7e-3 to 4.4e-2.

        So it makes up for a start that is far too large. Against the best constant its
        loss is 6 to 70 times higher for dense and up to 2 times for sparse rows on
        digits, and 8 to 11 times and 2 times on the sine. Steps at rates near 1/m are
        nearly always predicted well on their own batch, so the damping falls to 1e-6 to
        2e-5 from anywhere, below what serves the loss over all batches.
    """
    if not callable(make_tx):
        raise TypeError(
            f"`make_tx` must be a function of the damping, got {make_tx!r}. Pass for"
            " example `lambda damping: efcp_jax.mfac(0.1, damping=damping)`."
        )
    every = _validate.positive_int("every", every)
    remedy = "Pass the default, 1e-8, to hardly ever reach it."
    low = _validate.number("low", low, low=0.0, open_low=True, remedy=remedy)
    remedy = "Pass at least `low`."
    high = _validate.number("high", high, low=low, remedy=remedy)
    remedy = "Pass a number between `low` and `high`, such as 1e-2."
    damping = _validate.number("damping", damping, low=low, high=high, remedy=remedy)
    decay = _validate.number(
        "decay",
        decay,
        low=0.0,
        high=1.0,
        open_low=True,
        open_high=True,
        remedy="Pass a number such as 0.95.",
    )
    factor = decay**every

    def inner(value: Any) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(make_tx(value))

    # One for all calls of `init`: it answers `optax.tree.map_params` with the structure
    # of the state that it has made before.
    first = inner(damping)

    def init_fn(params):
        return AdaptiveDampingState(
            stepped=jnp.zeros((), jnp.int32),
            damping=jnp.asarray(damping, jnp.float32),
            reduction_ratio=jnp.zeros((), jnp.float32),
            inner_state=first.init(params),
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        if params is None or value_fn is None:
            raise ValueError(
                "`adaptive_damping` evaluates the loss: call `update(gradient, state,"
                " params, value_fn=value_fn)` with a function from parameters to the"
                " loss of the batch."
            )
        old: AdaptiveDampingState = state
        new_updates, inner_state = inner(old.damping).update(
            updates, old.inner_state, params, value_fn=value_fn, **extra_args
        )
        stepped = jnp.asarray(optax.safe_increment(old.stepped))

        def look() -> tuple[jax.Array, jax.Array]:
            before = extra_args.get("value")
            before = value_fn(params) if before is None else before
            after = value_fn(optax.apply_updates(params, new_updates))
            change = jnp.asarray(after, jnp.float32) - jnp.asarray(before, jnp.float32)
            predicted = _product(updates, new_updates)
            descends = predicted < 0  # False for NaN
            ratio = change / jnp.where(descends, predicted, 1)
            # A value that is not a number is as bad as one that has risen.
            ratio = jnp.where(jnp.isfinite(ratio), ratio, -jnp.inf)
            change = jnp.where(
                ratio > _GOOD, factor, jnp.where(ratio < _BAD, 1 / factor, 1)
            )
            value = jnp.clip(old.damping * change, low, high)
            keep = lambda new, kept: jnp.where(descends, new, kept).astype(kept.dtype)
            return keep(value, old.damping), keep(ratio, old.reduction_ratio)

        value, ratio = lax.cond(
            stepped % every == 0, look, lambda: (old.damping, old.reduction_ratio)
        )
        return new_updates, AdaptiveDampingState(stepped, value, ratio, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _product(left: Any, right: Any) -> jax.Array:
    """Return the real inner product of two trees, in float32 or wider."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (x.astype(jnp.result_type(x, jnp.float32)) for x in (a, b))
        return jnp.sum((a.conj() * b).real)

    return sum(jax.tree.leaves(jax.tree.map(one, left, right)), jnp.zeros(()))

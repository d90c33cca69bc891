"""What the optimizers have in common: their defaults, and the chain they end in."""

import numbers
from typing import Any, Literal

import jax
from jax.core import Tracer
import jax.numpy as jnp
import optax

from efcp_jax import _validate
from efcp_jax.compressors import Compressor, top_k
from efcp_jax.metrics import DiagonalMetric, diagonal_metric


# Entries a block of the sparse optimizers, and the share of them that is kept: offsets
# take a byte, every platform compares them in place of gathering and scattering, and
# two of 128 train better than as many bytes in larger blocks.
_BLOCK_SIZE = 128
_DENSITY = 2 / 128

# What they store values and errors in: three bytes an entry, two for each error. What
# rounding drops, error feedback adds to the next gradient.
_STORED = jnp.bfloat16


def sparse(density: Any, block_size: Any, value_dtype: Any) -> Compressor:
    """Return the compressor of the sparse optimizers, with their defaults for None."""
    return top_k(
        _DENSITY if density is None else density,
        block_size=_BLOCK_SIZE if block_size is None else block_size,
        value_dtype=stored_dtype(value_dtype, density),
    )


def stored_dtype(dtype: Any, density: Any) -> Any:
    """Return the dtype of values or errors of sparse rows, the default where None.

    With density 1 that is the working dtype: where nothing is dropped, nothing is
    rounded either, and the optimizer is the dense one.
    """
    if dtype is not None or (isinstance(density, numbers.Real) and density == 1):
        return dtype
    return _STORED


def metric_of(
    metric: DiagonalMetric | Literal["auto"] | None, ridge: Any, relative: bool
) -> DiagonalMetric | None:
    """Return the metric of an optimizer, given its damping or eps.

    In units of the window one learning rate is to serve every model, which it does in
    Adam's metric. Where the unit is the published one, so is the optimizer.
    """
    if not (isinstance(metric, str) and metric == "auto"):
        return metric
    relative = _validate.boolean("relative", relative)
    return diagonal_metric() if relative or ridge is None else None


def with_learning_rate(
    preconditioner: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule | None,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """Chain momentum, decoupled weight decay and the learning rate behind.

    What is not needed is replaced by `optax.identity`, so that the state has the same
    structure whether or not a hyperparameter is injected.
    """
    _validate.number("learning_rate", learning_rate)
    _validate.number("weight_decay", weight_decay)
    trace, decay = optax.identity(), optax.identity()
    if momentum is not None and not _is_zero(_validate.number("momentum", momentum)):
        make: Any = optax.trace
        if callable(momentum):
            make = optax.inject_hyperparams(make)
        trace = _steady(make(momentum))
    if not _is_zero(weight_decay):
        decay = _steady(optax.add_decayed_weights(weight_decay, mask))
    rate = _steady(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(preconditioner, trace, decay, rate)


def _steady(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Return `tx` whose updates and state keep their dtypes.

    A number that is an array of float32 would make updates and momentum of bfloat16
    float32.
    """
    tx = optax.with_extra_args_support(tx)
    cast = lambda new, old: jnp.asarray(new, jnp.result_type(old))

    def update_fn(updates, state, params=None, **extra_args):
        new = tx.update(updates, state, params, **extra_args)
        return jax.tree.map(cast, new, (updates, state))

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _is_zero(value: Any) -> bool:
    return not isinstance(value, jax.Array | Tracer) and value == 0

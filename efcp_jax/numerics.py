"""Products, casts and scales that lose nothing they need not lose."""

from collections.abc import Callable
import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


# Compilers for TPUs unroll what is done with a matrix inside a loop: a product or a
# triangular solution of 1024 rows takes half a minute, and in blocks of rows seconds.
_BLOCK = 256

# Entries that an index of 32 bits tells apart; JAX has no others without 64-bit mode.
_INDEXED = 2**31 - 1


@jax.custom_jvp
def root(square: jax.Array) -> jax.Array:
    """Return the root of a sum of squares; its derivative at 0 is the mean slope, 0."""
    return jnp.sqrt(square)


@jax.custom_jvp
def at_least_zero(value: jax.Array) -> jax.Array:
    """Return the larger of `value` and 0; its derivative at 0 is that above."""
    return jnp.maximum(value, 0)


_slope = lambda root: jnp.where(root > 0, 0.5 / jnp.where(root > 0, root, 1), 0)
root.defjvps(lambda tangent, value, _: _slope(value) * tangent)
at_least_zero.defjvps(lambda tangent, _, value: jnp.where(value < 0, 0, tangent))


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return the product in full precision, which accelerators do not by default."""
    return jnp.dot(left, right, precision=lax.Precision.HIGHEST)


def dot_by_rows(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return the product of matrices by blocks of rows, as a small program."""
    return by_rows(lambda rows: dot(rows, right), left)


def by_rows(function: Callable[[jax.Array], jax.Array], matrix: jax.Array) -> jax.Array:
    """Return what `function` makes of the rows of a matrix, one block after another."""
    size = len(matrix)
    blocks = -(-size // _BLOCK)
    if blocks == 1:
        return function(matrix)
    rows = jnp.pad(matrix, ((0, blocks * _BLOCK - size), (0, 0)))
    made = lax.map(function, rows.reshape(blocks, _BLOCK, -1))
    return made.reshape(blocks * _BLOCK, -1)[:size]


def contract(
    subscripts: str, *arrays: jax.Array, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Return the `einsum` in full precision, in `dtype` or the widest of those given.

    Numbers of half precision are multiplied as they are and added up in float32.
    """
    # What is promoted is half precision to the dtype that is asked for.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.einsum(
            subscripts,
            *arrays,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype or jnp.result_type(*arrays, jnp.float32),
        )


def widest(*dtypes: jax.typing.DTypeLike) -> np.dtype:
    """Return the dtype, float32 or wider, that holds what all of `dtypes` hold."""
    # NumPy's, as that of JAX refuses where promotion is set to be strict.
    each = (jnp.dtype(dtype) for dtype in dtypes)
    return functools.reduce(np.promote_types, each, np.dtype(np.float32))


def saturate(value: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Cast to `dtype`; what overflows becomes its largest number, NaN stays NaN."""
    limit = min(float(jnp.finfo(each).max) for each in (dtype, value.dtype))
    return jnp.clip(value, -limit, limit).astype(dtype)


def cast(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """Cast to `dtype`, within its range."""
    if jnp.issubdtype(dtype, jnp.floating) and dtype != value.dtype:
        return saturate(value, dtype)
    return value.astype(dtype)


@jax.custom_jvp
def power_of_two(peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the least power of two above `peak`, and its inverse; zeros for zero.

    Both are normal numbers, so multiplying by one and then the other is exact. They are
    constants, and where a derivative is taken ones for zero: 0 times a row would hide
    that the row depends on something.
    """
    info = jnp.finfo(peak.dtype)
    _, exponent = jnp.frexp(peak)
    exponent = jnp.clip(exponent, info.minexp + 2, info.maxexp - 2)
    one = jnp.ones_like(peak)
    scale, inverse = jnp.ldexp(one, exponent), jnp.ldexp(one, -exponent)
    zero = jnp.zeros_like(peak)
    return jnp.where(peak > 0, scale, zero), jnp.where(peak > 0, inverse, zero)


@power_of_two.defjvp
def _power_of_two_jvp(primals: Any, tangents: Any) -> Any:
    del tangents
    made = tuple(jnp.where(x == 0, 1, x) for x in power_of_two(*primals))
    return made, tuple(map(jnp.zeros_like, made))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def constant(value: jax.Array, why: str) -> jax.Array:
    """Return `value`, of which a derivative raises: `why`, and what to do."""
    del why
    return value


@constant.defjvp
def _constant_jvp(why: str, *_: Any) -> Any:
    raise NotImplementedError(f"efcp_jax has no derivative here: {why}")


def not_vanished(value: Any) -> Any:
    """Return `value`, or where it is a zero of float16 the least number that is not."""
    # `optax.inject_hyperparams` rounds `damping=1e-8` to zero in such a model's dtype.
    if getattr(value, "dtype", None) != jnp.float16:
        return value
    return jnp.where(value == 0, jnp.finfo(jnp.float16).smallest_subnormal, value)


def indexed(size: int = 1) -> int:
    """Return how many units of `size` entries an index reaches across, one at least."""
    return max(1, _INDEXED // size)


def roots(factor: chex.Numeric, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """Return a power of two near the root of `factor`, and the factor over it.

    One for a factor of a product and one for the product, neither over- nor underflows.
    """
    factor = jnp.asarray(factor, dtype)
    _, exponent = jnp.frexp(factor)
    first = jnp.ldexp(jnp.ones_like(factor), exponent // 2)
    return first, factor / first

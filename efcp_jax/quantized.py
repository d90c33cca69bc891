r"""Errors of 8 bits: a power of two for every group, and rounding that drifts nowhere.

$e \approx u\, q$ with whole numbers $q$ of at most 127 and the least unit $u$ that lets
them be so. $q = \lfloor e / u + \xi \rfloor$ with $\xi$ uniform in [0, 1), so that the
mean is $e / u$: rounding to the nearest would lose whatever is below half a unit, step
after step. $\xi$ is a hash of the step and the place, so runs repeat bit for bit.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from efcp_jax.numerics import cast, constant


# Numbers along the last axis that share a unit: the lines of tiles of sparse rows, no
# longer than this, else about as many at a time as take no memory to speak of.
_LONGEST = 256
_GROUP = 128
_SHORTEST = 32

# The largest whole number, and the exponents of a unit: it and its inverse are normal.
_MOST = 127
_EXPONENTS = (-126, 126)
DTYPE = jnp.dtype(jnp.int8)
_NO_DERIVATIVE = "errors of 8 bits are whole numbers. Pass `error_dtype=jnp.bfloat16`."


class Quantized(NamedTuple):
    """An array of a vector in int8, and a power of two, bfloat16, for each group."""

    values: Any
    units: Any


def zeros(vector: Any, specs: Any, dtype: np.dtype | None) -> Any:
    """Return the zero `vector`, which `specs` divide, as an error kept in `dtype`."""

    def one(x: jax.Array, spec: Any) -> Any:
        if dtype != DTYPE:
            return x.astype(dtype or x.dtype)
        divided = len(spec) == x.ndim and spec[-1] is not None
        count = _count(x.shape[-1], divided)
        units = jnp.zeros((*x.shape[:-1], count), jnp.bfloat16)
        return Quantized(x.astype(DTYPE), units)

    return jax.tree.map(one, vector, specs)


def specs(vector: Any, dtype: np.dtype | None) -> Any:
    """Return how an error is divided among devices, from how a vector is."""
    if dtype != DTYPE:
        return vector
    each = lambda spec: Quantized(spec, spec)
    return jax.tree.map(each, vector, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _count(size: int, divided: bool) -> int:
    """Return into how many groups an axis of `size` is cut.

    Where it is `divided`, all are of one size: on all devices those of the whole axis.
    """
    if size <= _LONGEST:
        return 1
    if not divided:
        return -(-size // _GROUP)
    counts = range(-(-size // _LONGEST), size // _SHORTEST + 1)
    return next((n for n in counts if size % n == 0), 1)


def load(error: Any, dtype: Any = None) -> Any:
    """Return an error as a vector in `dtype`; None leaves it, but of 8 bits float32."""

    def one(x: Any) -> Any:
        if not isinstance(x, Quantized):
            return x.astype(dtype or x.dtype)
        units = x.units.astype(dtype or np.float32)
        return x.values.astype(units.dtype) * _spread(units, x.values)

    return jax.tree.map(one, error, is_leaf=lambda x: isinstance(x, Quantized))


def store(
    vector: Any, like: Any, accept: jax.Array, count: jax.Array, first: Any = 0
) -> Any:
    """Return `vector`, what is left behind step `count`, as the error `like` is kept.

    Of 8 bits it is so in the mean over `count`, and exactly if `load` has returned it.
    If not `accept`, nothing has been added or taken away, and no bit of `like` changes.
    The vector begins with the line `first` of the array it is a part of.
    """

    def one(x: jax.Array, old: Any) -> Any:
        if not isinstance(old, Quantized):
            # An infinity in the error would make every later step non-finite.
            return cast(x, old.dtype)
        x = constant(x, _NO_DERIVATIVE)
        unit = _units(x, old.units.shape[-1], jnp)
        scaled = x * _spread(1 / unit, x)
        values = at_random(scaled, uniform(x.shape, count, first)).astype(DTYPE)
        new = Quantized(values, unit.astype(jnp.bfloat16))
        return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)

    return jax.tree.map(one, vector, like)


def store_on_host(vector: Any, like: Any) -> Any:
    """Return a vector as `like` is kept, rounded to the nearest, in arrays of NumPy."""

    def one(x: np.ndarray, old: Any) -> Any:
        if not isinstance(old, Quantized):
            return x
        unit = _units(x, old.units.shape[-1], np)
        whole = np.clip(np.rint(x / _spread(unit, x)), -_MOST, _MOST)
        return Quantized(whole.astype(DTYPE), unit.astype(jnp.bfloat16))

    return jax.tree.map(one, vector, like)


def at_random(scaled: jax.Array, chance: jax.Array) -> jax.Array:
    """Return numbers rounded up where `chance`, in [0, 1), is below what is left."""
    whole = jnp.floor(scaled)
    whole += jnp.where(chance < scaled - whole, 1.0, 0.0)
    return jnp.clip(whole, -_MOST, _MOST)


def uniform(shape: tuple[int, ...], count: jax.Array, first: Any = 0) -> jax.Array:
    """Return numbers in [0, 1) that depend on `count` and their place in all lines."""
    place, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(range(len(shape))):
        along = lax.broadcasted_iota(jnp.int32, shape, axis)
        along = along if axis else along + jnp.asarray(first, jnp.int32)
        place += along * _wrapped(stride)
        stride *= shape[axis]
    return hashed(place, count)


def hashed(place: jax.Array, count: jax.Array) -> jax.Array:
    """Return a number in [0, 1) from all 32 bits of each place, as MurmurHash3 ends."""
    above = lambda x, bits: lax.shift_right_logical(x, jnp.full_like(x, bits))
    x = place + count * _wrapped(0x9E3779B9)
    x = (x ^ above(x, 16)) * _wrapped(0x85EBCA6B)
    x = (x ^ above(x, 13)) * _wrapped(0xC2B2AE35)
    x = x ^ above(x, 16)
    # As many bits as a float32 holds without rounding up to one.
    return above(x, 8).astype(jnp.float32) * 2.0**-24


def _wrapped(number: int) -> np.int32:
    """Return `number` modulo 2^32, as kernels multiply: of either sign."""
    return np.uint32(number % 2**32).view(np.int32)


def _units(x: Any, count: int, xp: Any) -> Any:
    """Return the unit of each of `count` groups along the last axis; 1 for zeros."""
    group = -(-x.shape[-1] // count)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, count * group - x.shape[-1])]
    magnitudes = xp.pad(xp.abs(x), pad).reshape(*x.shape[:-1], count, group)
    peak = xp.max(magnitudes, axis=-1, initial=0)
    return xp.ldexp(xp.ones_like(peak), exponents(peak, xp))


def exponents(peak: Any, xp: Any = jnp) -> Any:
    """Return the exponents of units, from the largest magnitudes of groups; 0 for 0.

    They are of the least powers of two that are at least the peak over 127: of whole
    numbers up to 127 what they were multiplied by, or half of that.
    """
    share, exponent = xp.frexp(peak)
    exponent = exponent - 7 + xp.where(share > _MOST / 128, 1, 0)
    return xp.where(peak > 0, xp.clip(exponent, *_EXPONENTS), 0)


def _spread(units: Any, x: Any) -> Any:
    """Return the unit of each number of `x`."""
    if units.shape[-1] == 1:
        return units
    group = -(-x.shape[-1] // units.shape[-1])
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.repeat(units, group, axis=-1)[..., : x.shape[-1]]

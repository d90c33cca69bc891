"""Lengths of two trees and the cosine between them, without over- or underflow."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from efcp_jax.numerics import widest


class Alignment(NamedTuple):
    """How two trees lie to each other.

    Attributes:
        cosine: Their inner product over the product of their lengths, in [-1, 1]; 0
            where one of them is zero. Of complex trees the real part.
        norms: Their Euclidean lengths.
    """

    cosine: jax.Array
    norms: tuple[jax.Array, jax.Array]


def alignment(first: chex.ArrayTree, second: chex.ArrayTree, dtype: Any) -> Alignment:
    """Return the lengths of two trees and their cosine, as scalars of `dtype`.

    Both are divided by their largest entries first. What is not a number makes the
    cosine and the length of its tree NaN.
    """
    trees = [
        [_wide(leaf, dtype) for leaf in jax.tree.leaves(t)] for t in (first, second)
    ]
    peaks = [_peak(leaves, dtype) for leaves in trees]
    divisors = [jnp.where(peak > 0, peak, 1) for peak in peaks]
    left, right = (
        [leaf / divisor for leaf in leaves]
        for leaves, divisor in zip(trees, divisors, strict=True)
    )
    lengths = [jnp.sqrt(_inner(leaves, leaves, dtype)) for leaves in (left, right)]
    product = lengths[0] * lengths[1]
    cosine = _inner(left, right, dtype) / jnp.where(product > 0, product, 1)
    # Lengths round too, so equal directions may come out above 1.
    cosine = jnp.clip(jnp.where(product == 0, 0, cosine), -1, 1)
    norms = (peaks[0] * lengths[0], peaks[1] * lengths[1])
    # In place of 0 over 1, where one is not a number.
    return Alignment(jnp.where(jnp.isnan(product), jnp.nan, cosine), norms)


def _wide(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Return `leaf` in the real or complex form of `dtype`."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return leaf.astype(widest(dtype, jnp.complex64))
    return leaf.astype(dtype)


def _peak(leaves: list[jax.Array], dtype: Any) -> jax.Array:
    zero = jnp.zeros((), dtype)
    peaks = [jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]
    return jnp.max(jnp.stack(peaks)) if peaks else zero


def _inner(left: list[jax.Array], right: list[jax.Array], dtype: Any) -> jax.Array:
    pairs = zip(left, right, strict=True)
    parts = [jnp.sum((a * b.conj()).real) for a, b in pairs]
    return sum(parts, jnp.zeros((), dtype))

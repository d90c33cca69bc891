"""Overwriting one row of a window where it lies."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.passes.overwrite import overwrite


def insert(
    rows: jax.Array, row: jax.Array, slot: jax.Array, axis: int, accept: jax.Array
) -> jax.Array:
    """Return `rows` with `row` at `slot` if `accept`; in place if they are donated.

    Args:
        rows: Rows laid end to end along `axis`.
        row: One row, shorter than `rows` along `axis` and of the same size else.
        slot: Number of the row to overwrite, int32.
        axis: The axis of rows.
        accept: Whether to write, a boolean.

    Returns:
        Array of the shape and dtype of `rows`.
    """
    size = row.shape[axis]
    write = lambda rows, row, slot: lax.dynamic_update_slice_in_dim(
        rows, row, slot * size, axis
    )

    def select(rows: jax.Array, row: jax.Array, slot: jax.Array) -> jax.Array:
        old = lax.dynamic_slice_in_dim(rows, slot * size, size, axis)
        return write(rows, jnp.where(accept, row, old), slot)

    @jax.custom_jvp
    def write_bits(rows: jax.Array, row: jax.Array, slot: jax.Array) -> jax.Array:
        pattern = f"uint{8 * rows.dtype.itemsize}"
        bits = lambda x: lax.bitcast_convert_type(x, pattern)
        return lax.bitcast_convert_type(write(bits(rows), bits(row), slot), rows.dtype)

    # Bits have no derivative.
    write_bits.defjvp(functools.partial(jax.jvp, write))

    # XLA on CPUs writes half precision and less by way of a float32 window, several
    # times slower than as integers.
    on_cpu = write_bits if _is_narrow(rows.dtype) else write
    return overwrite(accept, on_cpu, select, rows, row, slot)


def _is_narrow(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4

"""Scales, casts and products lose nothing they need not lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efcp_jax import numerics


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_power_of_two_divides_and_multiplies_exactly(dtype):
    info = jnp.finfo(dtype)
    mantissa = np.random.default_rng(0).uniform(1, 2, 300)
    exponent = np.linspace(info.minexp + 2, info.maxexp - 2, 300).astype(int)
    values = jnp.asarray(np.ldexp(mantissa, exponent), dtype)
    scale, inverse = jax.jit(jax.vmap(numerics.power_of_two))(values)
    np.testing.assert_array_equal(values * inverse * scale, values)
    assert bool(jnp.all(values * inverse <= 2))
    assert bool(jnp.all(values * inverse >= 0.25))


def test_power_of_two_of_zero_is_zero():
    for value in numerics.power_of_two(jnp.zeros(())):
        assert value == 0


def test_casts_saturate_and_keep_nan():
    values = jnp.array([1e30, -1e30, jnp.nan, 2.0])
    limit = float(jnp.finfo(jnp.float16).max)
    result = np.asarray(numerics.saturate(values, jnp.float16), np.float64)
    np.testing.assert_array_equal(result, [limit, -limit, np.nan, 2.0])


@pytest.mark.parametrize("factor", [2.0**-126, 2.0**126, 1.0, 0.0, 3.5])
def test_roots_multiply_where_the_factor_would_not(factor):
    first, second = map(np.float64, numerics.roots(factor, jnp.float32))
    assert first * second == factor
    if factor in (2.0**-126, 2.0**126):
        assert np.abs(np.log2([first, second])).max() <= 64

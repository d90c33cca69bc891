"""The kernel for NVIDIA GPUs against NumPy in float64; on the CPU it is interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tile_cases
from tile_cases import Case

from efcp_jax.passes import gpu_add
from efcp_jax.passes.scaled import ScaledRow


CASES = [
    Case(1, 32, 128, 1, 1),
    Case(2, 128, 128, 2, 16),
    Case(3, 64, 256, 4, 9),
    Case(1, 128, 128, 41, 3),
    Case(2, 128, 64, 2, 24),
    Case(4, 96, 1, 1, 8),
    Case(2, 128, 8, 8, 5),
]


def add(stored, weights, case, count):
    kernel = functools.partial(gpu_add.add, size=case.size, count=count, interpret=True)
    return jax.jit(kernel)(*stored, weights)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"]
)
def test_sums_of_rows_are_those_of_dense_rows(case, dtype):
    stored, matrix = tile_cases.window(case, dtype)
    weights = np.random.default_rng(3).normal(size=case.rows).astype(np.float32)
    each = jnp.repeat(jnp.asarray(weights), case.kept)
    if isinstance(stored, ScaledRow):
        scales = np.asarray(stored.scales).astype(np.float32)
        each = each * jnp.repeat(jnp.asarray(scales), case.kept, axis=1)
        stored = stored.values, stored.offsets
        assert each.shape == (case.tiles, case.rows * case.kept)
    values = stored[0]
    assert gpu_add.fits(values, each, case.size)
    flat = np.moveaxis(matrix, 0, 2).reshape(-1, case.rows)
    for count in (len(flat), len(flat) - case.size // 2, 1):
        got = add(stored, each, case, count)
        tile_cases.assert_sums(got, flat[:count], weights)


def test_every_entry_has_a_weight_of_its_own():
    case = CASES[1]
    stored, _ = tile_cases.window(case, "float32")
    each = jax.random.normal(jax.random.key(0), (case.rows * case.kept,))
    weighted = stored._replace(values=stored.values * each[:, None])
    count = case.tiles * case.lanes * case.size
    rows = tile_cases.dense(weighted, case).reshape(case.rows, -1)
    got = add(stored, each, case, count)
    tile_cases.assert_sums(got, rows.T, np.ones(case.rows))


def test_members_of_a_batch_are_as_if_alone():
    case = CASES[1]
    windows = [tile_cases.window(case, "bfloat16", seed)[0] for seed in range(3)]
    windows = jax.tree.map(lambda *each: jnp.stack(each), *windows)
    weights = jax.random.normal(jax.random.key(0), (3, case.rows * case.kept))
    tile_cases.assert_members(lambda *x: add(x[:2], x[2], case, 500), *windows, weights)


@pytest.mark.parametrize(
    ("lanes", "size", "dtype"),
    [(128, 100, "float32"), (27, 128, "float32"), (128, 128, "float64")],
)
def test_what_the_kernel_does_not_take_is_told_apart(lanes, size, dtype):
    values = jax.ShapeDtypeStruct((1, 4, lanes), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((4,), dtype)
    assert not gpu_add.fits(values, weights, size)

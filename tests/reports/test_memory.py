"""The memory report against arithmetic, and against the arrays themselves."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efcp_jax


M = 8
D = 6 * 50 + 50


def model():
    return {"bias": jnp.zeros(50), "kernel": jnp.zeros((6, 50))}


# Counters, scales and Gram matrix; a moment a row and column of the kernel and an entry
# of the bias, and their mean.
FIXED = 4 * (4 + M + M * M)
METRIC = 4 * (6 + 50 + 50 + 1)
OPTIMIZERS = {
    "mfac": (efcp_jax.mfac(0.1, M), 4 * M * D),
    "mfac-euclidean": (efcp_jax.mfac(0.1, M, metric=None), 4 * M * D - METRIC),
    # Three blocks of 128 hold 350 parameters with padding; two of each are kept.
    "sparse_mfac": (
        efcp_jax.sparse_mfac(0.1, M),
        M * 3 * 2 * (2 + 1) + 2 * 3 * 128,
    ),
    # Values and offsets of a byte, and two bytes for each row of the one tile.
    "sparse_mfac-int8": (
        efcp_jax.sparse_mfac(0.1, M, value_dtype=jnp.int8),
        M * (3 * 2 * 2 + 2) + 2 * 3 * 128,
    ),
    # 350 parameters are one block of at most 4096; 10% of it are 35 entries.
    "sparse_mfac-4096": (
        efcp_jax.sparse_mfac(0.1, M, 0.1, block_size=4096),
        M * 35 * (2 + 2) + 2 * D,
    ),
    "sparse_mfac-f32": (
        efcp_jax.sparse_mfac(0.1, M, 0.1, block_size=4096, **cases.WIDE),
        M * 35 * (4 + 2) + 4 * D,
    ),
    # Five blocks of 80 hold 350 parameters with padding; 5% of one are 4 entries.
    "sparse_ggt-blocks": (
        efcp_jax.sparse_ggt(0.1, M, 0.05, block_size=80),
        M * 5 * 4 * (2 + 1) + 2 * 5 * 80,
    ),
    # The kernel as (6 + 50) r factors, the vector as itself, a scale a row for each; a
    # basis of 50 r.
    "low_rank_ggt": (
        efcp_jax.low_rank_ggt(0.1, M, 2),
        4 * M * (2 * (6 + 50) + 50 + 2) + 4 * D + 4 * 2 * 50,
    ),
    "momentum": (efcp_jax.mfac(0.1, M, momentum=0.9), 4 * M * D + 4 * D),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_equal_the_arithmetic_and_the_arrays(name):
    tx, expected = OPTIMIZERS[name]
    report = efcp_jax.memory_report(tx, model())
    assert report.total == expected + FIXED + METRIC
    state = tx.init(model())
    assert report.total == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert report.total == sum(report.fields.values())
    assert report.parameters == D
    assert report.per_parameter == report.total / D
    assert report.dense_window == 4 * M * D
    # Two moments and a counter.
    assert report.adam == 2 * 4 * D + 4


def test_fields_are_named_by_their_place_in_the_state():
    tx = efcp_jax.scale_by_mfac(M, compressor=efcp_jax.top_k(0.1))
    assert efcp_jax.memory_report(tx, model()).fields == {
        "count": 4,
        "skipped": 4,
        "error": 4 * D,
        "window.rows.values": M * 35 * 4,
        "window.rows.offsets": M * 35 * 2,
        "window.scale": 4 * M,
        "window.slot": 4,
        "window.filled": 4,
        "gram": 4 * M * M,
    }


def test_nothing_is_allocated():
    # A trillion parameters.
    params = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    tx = efcp_jax.low_rank_mfac(0.1, window_size=1024, rank=4)
    report = efcp_jax.memory_report(tx, params)
    assert report.parameters == 10**12
    window = 4 * 1024 * 4 * 2 * 10**6
    assert report.total - 4 * 10**12 == pytest.approx(window, rel=1e-2)


def test_any_optimizer_has_a_report():
    report = efcp_jax.memory_report(optax.adam(1e-3), model())
    assert report.total == report.adam
    assert report.dense_window == 0
    report = efcp_jax.memory_report(
        efcp_jax.error_feedback(efcp_jax.top_k(0.1)), model()
    )
    assert report.total == 4 * D + 8


def test_a_block_diagonal_gram_is_counted_once_a_leaf():
    given = {"compressor": efcp_jax.low_rank(2), "block_diagonal": True}
    tx = efcp_jax.scale_by_mfac(M, **given)
    assert efcp_jax.memory_report(tx, cases.params()).fields["gram"] == 4 * M * M * 4


def test_the_table_shows_every_field_and_its_share():
    report = efcp_jax.memory_report(efcp_jax.mfac(0.1, M), model())
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.fields) + 3
    total = next(line for line in lines if line.startswith("total"))
    assert total.split() == [
        "total",
        f"{report.total:,}",
        f"{report.per_parameter:.2f}",
    ]
    assert np.all([name in str(report) for name in report.fields])

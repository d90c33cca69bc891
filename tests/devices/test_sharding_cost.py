"""The cost model of `examples/README.md`, against compiled programs."""

import pathlib

from collectives import collectives
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import efcp_jax


README = pathlib.Path(__file__).parents[2] / "examples" / "README.md"


def sparse_bytes(d, n, m, block, kept, value, offset, error=4):
    """Return bytes a device of the window, and of everything."""
    window = m * kept / block * (value + offset) * d / n
    return window + error * d / n + small_bytes(m)


def dense_bytes(d, n, m, value, error):
    return (m * value + error) * d / n + small_bytes(m)


def low_rank_bytes(matrices, rows, cols, n_rows, n_cols, m, rank, value):
    """Return bytes a device of equal matrices, each side divided by its axes.

    Every row has a ratio for them.
    """
    window = m * rank * value * (rows / n_rows + cols / n_cols)
    error = 4 * rows * cols / (n_rows * n_cols)
    basis = 4 * rank * cols / n_cols
    return matrices * (window + error + basis) + 4 * m + small_bytes(m)


def small_bytes(m):
    """Return bytes of the Gram matrix, the scales and four counters."""
    return 4 * m * m + 4 * m + 16


def compiled(tx, shapes, axes, specs):
    kinds = (AxisType.Explicit,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
    params = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
        )
        for name, shape in shapes.items()
    }
    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            efcp_jax.sharding.abstract_state(tx, params),
            efcp_jax.sharding.state_shardings(tx, params),
        )
        update = jax.jit(tx.update).lower(params, state, params).compile()
        local = sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(state)
        )
        init = jax.jit(tx.init).lower(params).compile().memory_analysis()
    # The compiler adds a table of pointers to the outputs.
    table = 8 * len(jax.tree.leaves(state))
    assert init.output_size_in_bytes - local in (0, table)
    return local, update


SHAPES = {"w": (256, 64)}
SIZE = 256 * 64


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_bytes_a_device_are_those_of_the_cost_model(devices):
    axes, specs = {"x": devices}, {"w": P("x")}
    sparse = efcp_jax.top_k(1 / 16, block_size=256, value_dtype=jnp.bfloat16)
    for m in (4, 9):
        found, _ = compiled(
            efcp_jax.scale_by_mfac(m, compressor=sparse), SHAPES, axes, specs
        )
        assert found == sparse_bytes(SIZE, devices, m, 256, 16, 2, 1)
    dense = efcp_jax.identity(value_dtype=jnp.bfloat16)
    found, _ = compiled(
        efcp_jax.scale_by_mfac(4, compressor=dense), SHAPES, axes, specs
    )
    assert found == dense_bytes(SIZE, devices, 4, 2, 4)
    for axes, spec in (
        ({"x": devices}, P("x")),
        ({"x": devices}, P(None, "x")),
        ({"x": devices // 2, "y": 2}, P("x", "y")),
    ):
        ways = [axes[name] if name else 1 for name in (*spec, None)[:2]]
        tx = efcp_jax.scale_by_mfac(4, compressor=efcp_jax.low_rank(3))
        found, _ = compiled(tx, SHAPES, axes, {"w": spec})
        assert found == low_rank_bytes(1, 256, 64, *ways, 4, 3, 4)


@pytest.mark.parametrize(
    ("compressor", "slope"),
    [
        (efcp_jax.identity(), lambda rows, cols, n: 4 * rows * cols / n),
        (
            efcp_jax.low_rank(2),
            lambda rows, cols, n: 2 * 4 * (rows / n + cols) + 2 * 2 * rows * cols / n,
        ),
    ],
    ids=["dense", "low rank"],
)
def test_operations_grow_with_the_window_as_in_the_cost_model(compressor, slope):
    # Wide enough that what is not a product over the window is small beside it.
    shapes, n = {"w": (1024, 512)}, 8
    flops = []
    for m in (8, 24):
        tx = efcp_jax.scale_by_mfac(m, compressor=compressor)
        _, update = compiled(tx, shapes, {"x": n}, {"w": P("x")})
        flops.append(update.cost_analysis()["flops"])
    expected = slope(1024, 512, n)
    assert (flops[1] - flops[0]) / 16 == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_bytes_on_the_wire_are_those_of_the_cost_model():
    # A tile of 128 blocks for each device.
    sparse = efcp_jax.top_k(1 / 16, block_size=16)
    for m in (4, 9):
        tx = efcp_jax.scale_by_mfac(m, compressor=sparse)
        for spec, gathered in ((P("x"), 0), (P(), SIZE)):
            _, update = compiled(tx, SHAPES, {"x": 8}, {"w": spec})
            found = dict(collectives(update))
            assert found.pop("all-reduce") == m
            assert found.pop("all-gather", 0) == gathered
            assert not found


# The large transformer of the table: rows, columns and number of its matrices. Its
# vectors are one part in 50,000.
MATRICES = [
    (4096, 4096, 4 * 32),
    (4096, 11008, 2 * 32),
    (11008, 4096, 32),
    (32000, 4096, 1),
    (4096, 32000, 1),
]


def low_rank_operations(rows, cols, n_rows, n_cols, m, rank):
    products = (2 * m * rank + 6 * rank) * rows * cols / (n_rows * n_cols)
    return products + 2 * m * rank**2 * (rows / n_rows + cols / n_cols)


def test_the_table_in_the_readme_follows_from_the_formulas():
    text = README.read_text()
    n, m = 256, 64
    d = sum(rows * cols * count for rows, cols, count in MATRICES)

    def low_rank(cost, n_rows, n_cols, *args):
        each = [
            count * cost(rows, cols, n_rows, n_cols, m, *args)
            for rows, cols, count in MATRICES
        ]
        return sum(each)

    def held(*ways):
        one = lambda *args: low_rank_bytes(1, *args) - small_bytes(m)
        return low_rank(one, *ways, 4, 2) + small_bytes(m)

    def sent(ways, numbers):
        return 2 * 4 * numbers * (ways - 1) / ways

    rows = sum(rows * count for rows, _, count in MATRICES)
    cols = sum(cols * count for _, cols, count in MATRICES)
    count = sum(count for *_, count in MATRICES)
    kept = 2.5 * 1024**2  # of the factorisation
    megabytes = {
        "sparse": sparse_bytes(d, n, m, 128, 2, 2, 1),
        "sparse, 1 of 128, m = 1024": sparse_bytes(d, n, 1024, 128, 1, 2, 1) + kept,
        "dense": dense_bytes(d, n, m, 4, 0),
        "low rank, rows over 256": held(256, 1),
        "low rank, 16 x 16": held(16, 16),
        "Adam": 8 * d / n,
    }
    operations = {
        "sparse": 4 * m * 2 / 128 * d / n,
        "sparse, 1 of 128, m = 1024": 4 * 1024 / 128 * d / n,
        "dense": 4 * m * d / n,
        "low rank, rows over 256": low_rank(low_rank_operations, 256, 1, 4),
        "low rank, 16 x 16": low_rank(low_rank_operations, 16, 16, 4),
    }
    small = count * (4 + 2 * 4**2) + m  # lengths, two r x r products, inner products
    sides = (rows + cols) / 4 + count * (2 * 4 + m * 4**2)
    wire = {
        "sparse": f"{sent(n, m) / 1e3:.1f} kB",
        "sparse, 1 of 128, m = 1024": f"{sent(n, 1024) / 1e3:.0f} kB",
        "dense": f"{sent(n, m) / 1e3:.1f} kB",
        "low rank, rows over 256": f"{sent(n, 4 * cols + small) / 1e6:.0f} MB",
        "low rank, 16 x 16": f"{sent(16, sides + small) / 1e6:.0f} MB",
    }
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    table = {line[0]: line[1:4] for line in cells if len(line) >= 4}
    for name, value in megabytes.items():
        assert table[name][0] == f"{value / 1e6:,.0f} MB", (name, value)
    for name, value in operations.items():
        assert table[name][1] == f"{value / 1e9:.2f} GFLOP", (name, value)
    for name, value in wire.items():
        assert table[name][2] == value
    assert f"sends {6 * d / 1e9:.0f} GB" in text
    assert f"= {6 * d / n / 1e6:.0f} MFLOP" in text
    assert f"receives {4 * d / 1e9:.0f} GB" in text

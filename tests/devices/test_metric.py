"""Metrics on many devices: the numbers of one, and nothing more than must travel."""

import functools

from collectives import collectives
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest
import sharding_cases as cases
from test_sharding import compiled_step

import efcp_jax


METRICS = {
    "factored": efcp_jax.diagonal_metric(),
    "full": efcp_jax.diagonal_metric(factored=False),
}
TOLERANCE = 200 * np.finfo(np.float32).eps


def make(alias, metric):
    return functools.partial(cases.ALIASES[alias], metric=METRICS[metric])


@functools.cache
def one_device(alias, metric):
    run = jax.jit(functools.partial(cases.train, make(alias, metric)()))
    updates, state = run(cases.params(), cases.gradients())
    return cases.vectors(updates), jax.tree.map(np.asarray, state[0].metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("placing", cases.PLACINGS)
def test_many_devices_give_the_numbers_of_one(placing, metric):
    where = cases.PLACINGS[placing]
    for alias in ("ggt", "low_rank_mfac"):
        updates, state = cases.train_on(
            where, make(alias, metric), cases.gradients(), AxisType.Explicit
        )
        values, kept = one_device(alias, metric)
        assert cases.worst(cases.vectors(updates), values) < TOLERANCE
        assert jax.tree.structure(kept) == jax.tree.structure(state[0].metric)
        close = lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5)
        jax.tree.map(close, state[0].metric, kept)


@pytest.mark.parametrize("kind", list(AxisType)[:2])
def test_sparse_rows_in_a_metric(kind):
    where = cases.PLACINGS["data"]
    updates, _ = cases.train_on(
        where, make("sparse_ggt", "factored"), cases.gradients(), kind
    )
    values, _ = one_device("sparse_ggt", "factored")
    assert cases.worst(cases.vectors(updates), values) < TOLERANCE


@pytest.mark.parametrize("metric", ["factored", "full"])
def test_auto_axes_need_no_argument(metric):
    """Leaves large enough to be divided, of shapes that have to be padded."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    shapes = {"b": (1003,), "s": (), "w": (1030, 1021)}
    tx = efcp_jax.scale_by_ggt(3, metric=METRICS[metric])
    each = {
        name: rng.normal(size=(4, *shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    run = jax.jit(functools.partial(cases.train, tx))
    expected, _ = run(params, each)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, P()))
        updates, state = run(placed, jax.device_put(each, NamedSharding(mesh, P())))
    worst = cases.worst(cases.vectors(updates), cases.vectors(expected))
    assert worst < TOLERANCE
    held = [
        leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.metric)
    ]
    total = sum(leaf.size for leaf in jax.tree.leaves(state.metric))
    assert sum(held) < total / (2 if metric == "factored" else 7)


@pytest.mark.parametrize("placing", ["data", "fsdp", "tensor", "fsdp x tensor"])
def test_the_mean_of_the_moments_travels_with_the_inner_products(placing):
    where, rows = cases.PLACINGS[placing], 5
    sums = {}
    for metric in (None, *METRICS.values()):
        tx = efcp_jax.scale_by_mfac(rows, metric=metric)
        found = collectives(compiled_step(where, tx, cases.SHAPES))
        sums[metric] = sorted(size for kind, size in found if kind == "all-reduce")
    assert sums[None] == [rows]
    assert sums[METRICS["full"]] == [rows + 1]
    # A number a row or a column of what is divided along the other side, and the mean
    # of each leaf that is divided along its rows: one collective for each set of axes.
    *before, last = sums[METRICS["factored"]]
    assert sum(before) + last <= rows + 1 + 2 * (8 + 16 + 8 * 2 + 8)
    most = {"data": 0, "fsdp": 1, "tensor": 1, "fsdp x tensor": 4}
    assert len(before) <= most[placing]


def test_state_goes_from_one_mesh_to_another():
    metric = METRICS["factored"]
    tx = efcp_jax.scale_by_ggt(3, metric=metric)
    rng = np.random.default_rng(0)
    shapes = {"b": (1003,), "s": (), "w": (1030, 1021)}
    each = {
        name: rng.normal(size=(4, *shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    run = jax.jit(functools.partial(cases.train, tx))
    _, alone = run(params, each)
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    here = jax.tree.map(jnp.asarray, params)
    there = efcp_jax.sharding.reshard_state(alone, (tx, here), (tx, placed))
    back = efcp_jax.sharding.reshard_state(there, (tx, placed), (tx, here))
    gradient = jax.tree.map(lambda g: g[0], each)
    with jax.set_mesh(mesh):
        update, _ = jax.jit(tx.update)(
            jax.device_put(gradient, NamedSharding(mesh, P())), there, placed
        )
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    expected, _ = jax.jit(tx.update)(gradient, alone, params)
    flat = lambda tree: cases.vectors(jax.tree.map(lambda x: np.asarray(x)[None], tree))
    assert cases.worst(flat(update), flat(expected)) < TOLERANCE


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_wrapper_works_on_a_mesh(kind):
    where = cases.PLACINGS["fsdp x tensor"]
    tx = efcp_jax.in_metric(optax.sgd(1.0), METRICS["factored"])
    updates, _ = cases.train_on(where, lambda sharding: tx, cases.gradients(), kind)
    run = jax.jit(functools.partial(cases.train, tx))
    expected, _ = run(cases.params(), cases.gradients())
    worst = cases.worst(cases.vectors(updates), cases.vectors(expected))
    assert worst < TOLERANCE

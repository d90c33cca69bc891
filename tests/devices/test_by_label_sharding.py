"""Parts of different representations on many devices, and moved between them."""

import functools

from collectives import collectives
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest
import sharding_cases as cases

import efcp_jax
from efcp_jax import by_label, identity, low_rank, top_k
from efcp_jax.sharding import reshard_state, state_shardings


LABELS = {"b": "rest", "k": "table", "w": "matrix"}
TOLERANCE = 100 * np.finfo(np.float32).eps


def make(kind="mfac", density=0.25, sharding=None):
    compressor = by_label(
        {
            "matrix": low_rank(2),
            "table": top_k(density, block_size=cases.BLOCK),
            "rest": identity(),
        },
        LABELS,
    )
    scale = {"mfac": efcp_jax.scale_by_mfac, "ggt": efcp_jax.scale_by_ggt}[kind]
    return scale(cases.WINDOW, 0.1, compressor=compressor, sharding=sharding)


@functools.cache
def one_device(kind, density):
    run = jax.jit(functools.partial(cases.train, make(kind, density)))
    return cases.vectors(run(cases.params(), cases.gradients())[0])


@pytest.mark.parametrize("kind", ["mfac", "ggt"])
@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("placing", ["data", "fsdp x tensor", "mixed"])
def test_many_devices_give_the_numbers_of_one(placing, mode, kind):
    # Of sharded leaves other blocks are cut, so there all entries are kept.
    density = 0.25 if placing == "data" else 1.0
    where = cases.PLACINGS[placing]
    updates, state = cases.train_on(
        where, functools.partial(make, kind, density), cases.gradients(), mode
    )
    assert state.skipped == 0
    expected = one_device(kind, density)
    assert cases.worst(cases.vectors(updates), expected) < TOLERANCE
    for name, update in updates.items():
        spec = P(None, *where.specs[name])
        assert update.sharding.is_equivalent_to(
            NamedSharding(where.make_mesh(mode), spec), update.ndim
        )


def test_an_auto_mesh_needs_no_sharding():
    where = cases.PLACINGS["fsdp"]
    mesh = where.make_mesh(AxisType.Auto)
    params = jax.device_put(cases.params(), where.shardings(mesh))
    stack = {n: NamedSharding(mesh, P(None, *s)) for n, s in where.specs.items()}
    gradients = jax.device_put(cases.gradients(), stack)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(cases.train, make()))
        updates, state = run(params, gradients)
    rows = state.window.rows.parts["table"].values
    assert not rows.sharding.is_fully_replicated
    assert cases.worst(cases.vectors(updates), one_device("mfac", 0.25)) < TOLERANCE


def test_shardings_of_the_state_and_one_sum_for_all_parts():
    where = cases.PLACINGS["fsdp"]
    mesh = where.make_mesh()
    params = jax.device_put(cases.params(), where.shardings(mesh))
    compressor = by_label(
        {"a": top_k(0.25, block_size=cases.BLOCK), "b": identity()},
        {"b": "b", "k": "a", "w": "a"},
    )
    tx = efcp_jax.scale_by_mfac(cases.WINDOW, compressor=compressor)
    shardings = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    found = jax.tree.map(lambda leaf: leaf.sharding, tx.init(params))
    assert jax.tree.structure(found) == jax.tree.structure(shardings)
    for a, b, leaf in zip(
        *map(jax.tree.leaves, (found, shardings, state)), strict=True
    ):
        assert a.is_equivalent_to(b, leaf.ndim)
    program = jax.jit(tx.update).lower(params, state, params).compile()
    assert collectives(program) == [("all-reduce", cases.WINDOW)]


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 1), (1, 8)])
def test_a_state_moves_to_other_devices_and_goes_on(before, after):
    specs = {"b": P("x"), "k": P(None, "x"), "w": P("x")}
    # Of sharded leaves other blocks are cut, so all entries are kept.
    compressor = by_label(
        {"matrix": low_rank(2), "table": top_k(1.0, block_size=8), "rest": identity()},
        LABELS,
    )
    tx = efcp_jax.scale_by_mfac(cases.WINDOW, 0.1, compressor=compressor)
    stacked = cases.gradients()

    def place(count):
        mesh = jax.make_mesh(
            (count,),
            ("x",),
            axis_types=(AxisType.Explicit,),
            devices=jax.devices()[:count],
        )
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        return jax.device_put(cases.params(), shardings), shardings

    def steps(params, shardings, state, numbers):
        update, results = jax.jit(tx.update), []
        for t in numbers:
            gradient = {name: leaf[t] for name, leaf in stacked.items()}
            gradient = jax.device_put(gradient, shardings)
            updates, state = update(gradient, state, params)
            results.append(
                np.concatenate([np.ravel(np.asarray(u)) for u in updates.values()])
            )
        return results, state

    params, shardings = place(before)
    _, state = steps(params, shardings, tx.init(params), range(4))
    expected, _ = steps(params, shardings, state, range(4, 7))
    new_params, new_shardings = place(after)
    moved = reshard_state(jax.device_get(state), (tx, params), (tx, new_params))
    results, _ = steps(new_params, new_shardings, moved, range(4, 7))
    assert cases.worst(results, expected) < TOLERANCE


def test_states_of_other_labels_are_not_moved():
    params = cases.params()
    swapped = by_label(
        {"matrix": low_rank(2), "table": top_k(0.25), "rest": identity()},
        {"b": "table", "k": "rest", "w": "matrix"},
    )
    other = efcp_jax.scale_by_mfac(cases.WINDOW, 0.1, compressor=swapped)
    tx = make()
    state = tx.init(params)
    with pytest.raises(ValueError, match="label parameters differently"):
        reshard_state(state, (tx, params), (other, params))

"""A step on many devices gives the numbers of one, with collectives of known size."""

import functools
import math

from collectives import collectives
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import oracles
import pytest
import sharding_cases as cases

import efcp_jax


# Float32 sums in another order: below this many rounding units, relative to the update,
# with condition numbers of some ten.
TOLERANCE = 100 * np.finfo(np.float32).eps

# All aliases on the mesh that divides both ways, one of each representation elsewhere.
EXPLICIT = [("fsdp x tensor", alias) for alias in cases.ALIASES]
EXPLICIT += [
    (placing, alias)
    for placing in cases.PLACINGS
    for alias in ("ggt", "sparse_mfac", "low_rank_mfac")
    if placing != "fsdp x tensor"
]
AUTO = [("fsdp", "mfac"), ("data", "sparse_ggt"), ("tensor and data", "low_rank_mfac")]


@functools.cache
def one_device(alias: str) -> list[np.ndarray]:
    run = jax.jit(functools.partial(cases.train, cases.ALIASES[alias]()))
    return cases.vectors(run(cases.params(), cases.gradients())[0])


@pytest.mark.parametrize(
    ("placing", "alias", "kind"),
    [(*each, AxisType.Explicit) for each in EXPLICIT]
    + [(*each, AxisType.Auto) for each in AUTO],
)
def test_many_devices_give_the_numbers_of_one(placing, alias, kind):
    where = cases.PLACINGS[placing]
    updates, state = cases.train_on(
        where, cases.ALIASES[alias], cases.gradients(), kind
    )
    values = cases.vectors(updates)
    assert state[0].count == cases.STEPS
    assert state[0].skipped == 0
    if not alias.startswith("low_rank"):
        expected = cases.oracle(alias, where, cases.gradients())
        assert cases.worst(values, expected) < TOLERANCE
    # Blocks of the same entries are chosen when parameters are replicated.
    if not alias.startswith("sparse") or placing == "data":
        assert cases.worst(values, one_device(alias)) < TOLERANCE
    for name, update in updates.items():
        spec = P(None, *where.specs[name])
        expected = NamedSharding(where.make_mesh(kind), spec)
        assert update.sharding.is_equivalent_to(expected, update.ndim)


@pytest.mark.parametrize("error_dtype", [jnp.float32, jnp.int8])
def test_blocks_that_are_fewer_than_devices_have_lanes_are_those_of_one(error_dtype):
    """Twenty blocks are one tile, which one of the devices has."""
    model, generator = {"w": np.zeros((20, 128), np.float32)}, np.random.default_rng(0)
    normal = generator.normal(size=(cases.STEPS, 20, 128))
    stacked = {"w": normal.astype(np.float32)}
    tx = efcp_jax.sparse_mfac(
        1.0, cases.WINDOW, 2 / 128, 0.1, block_size=128, error_dtype=error_dtype
    )
    run = jax.jit(functools.partial(cases.train, tx))
    alone, before = run(model, stacked)
    where = cases.Placing({"x": 8}, {"w": P()})
    mesh = where.make_mesh()
    with jax.set_mesh(mesh):
        on = lambda tree: jax.device_put(tree, {"w": NamedSharding(mesh, P())})
        found, state = run(on(model), on(stacked))
    assert cases.worst(cases.vectors(found), cases.vectors(alone)) < TOLERANCE
    kept = lambda state: (state[0].window.rows.offsets, state[0].error)
    each = (jax.tree.leaves(jax.device_get(kept(x))) for x in (state, before))
    for mine, its in zip(*each, strict=True):
        assert mine.shape == (8, *its.shape[1:])
        np.testing.assert_array_equal(mine[:1], its)
    assert np.any(state[0].window.rows.values)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_tiles_of_many_devices_round_as_those_of_one(dtype, kind):
    """Eight tiles of 128 blocks: on one device scaled by the row, on eight not."""
    model, generator = {"w": np.zeros((64, 64), np.float32)}, np.random.default_rng(0)
    shape = cases.STEPS, 64, 64
    magnitude = 2.0 ** -np.linspace(0, 12, 4096).reshape(64, 64)
    stacked = {"w": (magnitude * generator.normal(size=shape)).astype(np.float32)}
    make = lambda **given: efcp_jax.sparse_mfac(
        1.0, cases.WINDOW, 0.25, 0.1, block_size=4, value_dtype=dtype, **given
    )
    alone, before = jax.jit(functools.partial(cases.train, make()))(model, stacked)
    where = cases.Placing({"x": 8}, {"w": P()})
    mesh = where.make_mesh(kind)
    on, place = NamedSharding(mesh, P()), where.shardings(mesh)
    tx = make(sharding=None if kind == AxisType.Explicit else place)
    with jax.set_mesh(mesh):
        found, state = jax.jit(functools.partial(cases.train, tx))(
            jax.device_put(model, place), jax.device_put(stacked, {"w": on})
        )
    divided = NamedSharding(mesh, P("x"))
    for leaf in state[0].window.rows:
        assert leaf.sharding.is_equivalent_to(divided, leaf.ndim)
    assert cases.worst(cases.vectors(found), cases.vectors(alone)) < TOLERANCE
    np.testing.assert_array_equal(state[0].error, before[0].error)
    for mine, its in zip(
        state[0].window.rows[:2], before[0].window.rows[:2], strict=True
    ):
        np.testing.assert_array_equal(mine, its)


def compiled_step(where: cases.Placing, tx, shapes):
    mesh = where.make_mesh()
    params = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, where.specs[name])
        )
        for name, shape in shapes.items()
    }
    with jax.set_mesh(mesh):
        shardings = efcp_jax.sharding.state_shardings(tx, params)
        state = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            efcp_jax.sharding.abstract_state(tx, params),
            shardings,
        )
        step = jax.jit(tx.update, donate_argnums=1)
        return step.lower(params, state, params).compile()


@pytest.mark.parametrize("placing", cases.PLACINGS)
@pytest.mark.parametrize(
    "compressor",
    [efcp_jax.identity(), efcp_jax.top_k(0.25, block_size=cases.BLOCK)],
    ids=["identity", "top_k"],
)
def test_a_step_sums_m_numbers_and_gathers_only_over_idle_axes(placing, compressor):
    where, rows = cases.PLACINGS[placing], 5
    tx = efcp_jax.scale_by_mfac(rows, compressor=compressor)
    for factor in (1, 2) if placing == "fsdp" else (1,):  # m numbers, whatever d is
        shapes = {n: (factor * s[0], *s[1:]) for n, s in cases.SHAPES.items()}
        found = collectives(compiled_step(where, tx, shapes))
        expected = [("all-reduce", rows)]
        if where.idle:
            ways = math.prod(where.mesh[axis] for axis in where.idle)
            total = sum(map(math.prod, shapes.values()))
            local = total * ways // math.prod(where.mesh.values())
            # Whole tiles on every device; a dense row has no blocks to keep whole.
            tile = cases.BLOCK * oracles.lanes_of(local, cases.BLOCK)
            unit = ways * (1 if compressor.lossless else tile)
            expected.append(("all-gather", -(-local // unit) * unit))
        assert found == expected


@pytest.mark.slow
def test_low_rank_factors_travel_together_whatever_the_number_of_leaves():
    rank, rows = 2, 5
    for partition in (P("x"), P(None, "x"), P("x", "y")):
        counts = []
        for leaves in (1, 3):
            where = cases.Placing(
                {"x": 4, "y": 2}, {f"w{i}": partition for i in range(leaves)}
            )
            # No axis is idle: a long vector is divided over the rest.
            where.specs["v"] = P(("x", "y"))
            shapes = {name: (16, 32) for name in where.specs} | {"v": (16,)}
            if leaves > 1:  # of another shape, and so another batch
                shapes["w1"] = (32, 16)
            tx = efcp_jax.scale_by_mfac(rows, compressor=efcp_jax.low_rank(rank))
            found = collectives(compiled_step(where, tx, shapes))
            factors = leaves * rank * (16 + 32 + rows * rank + rank)
            assert {kind for kind, _ in found} == {"all-reduce"}
            assert max(size for _, size in found) <= factors
            assert sum(size for _, size in found) <= 2 * factors
            counts.append(len(found))
        assert counts[0] == counts[1] <= 11


def state_bytes(placing: cases.Placing, tx, shape) -> dict[str, int]:
    """Return what the compiled `init` holds on a device, and what it makes."""
    mesh = placing.make_mesh()
    params = {
        "w": jax.device_put(
            np.zeros(shape, np.float32), NamedSharding(mesh, placing.specs["w"])
        )
    }
    with jax.set_mesh(mesh):
        shardings = efcp_jax.sharding.state_shardings(tx, params)
        init = jax.jit(tx.init, out_shardings=shardings).lower(params).compile()
        state = init(params)
    memory = init.memory_analysis()
    held = [
        sum(s.data.nbytes for s in leaf.addressable_shards if s.device.id == 0)
        for leaf in jax.tree.leaves((state.window.rows, state.error))
    ]
    return {
        "window and error": sum(held),
        "compiled": memory.output_size_in_bytes + memory.temp_size_in_bytes,
        "whole": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    }


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x")], ids=str)
@pytest.mark.parametrize(
    "compressor",
    [
        efcp_jax.identity(value_dtype=jnp.bfloat16),
        efcp_jax.top_k(0.25, block_size=4),  # eight tiles
        efcp_jax.low_rank(2),
    ],
    ids=["identity", "top_k", "low_rank"],
)
def test_bytes_a_device_fall_as_one_over_the_devices(spec, compressor):
    tx = efcp_jax.scale_by_mfac(8, compressor=compressor)
    found = {
        n: state_bytes(cases.Placing({"x": n}, {"w": spec}), tx, (64, 64))
        for n in (1, 8)
    }
    if isinstance(compressor, type(efcp_jax.low_rank())):
        # One factor and the matrix are divided, the other factor, the basis and a ratio
        # for each row whole.
        other = 64 * 2 * 4 * 8 + 4 * 8
        share = (found[1]["window and error"] - other) / 8 + other
    else:
        share = found[1]["window and error"] / 8
    assert found[8]["window and error"] == share
    # Compiled for one of the eight, `init` never holds the whole state.
    small = 8 * 8 * 4 + 8 * 4 + 64 * 2 * 4 + 1024
    assert found[8]["compiled"] <= share + small < found[8]["whole"]


@pytest.mark.parametrize(
    ("placing", "bad"), [("data", np.nan), ("mixed", np.inf), ("fsdp x tensor", np.nan)]
)
def test_an_entry_that_is_not_finite_on_one_device_skips_the_step_on_all(placing, bad):
    where = cases.PLACINGS[placing]
    clean = cases.gradients(4)
    spoilt = {n: np.insert(g, 2, g[2], axis=0) for n, g in clean.items()}
    spoilt["w"][2, -1, -1] = bad  # held by the last device only, where sharded
    make = cases.ALIASES["sparse_mfac"]
    updates, state = cases.train_on(where, make, spoilt, AxisType.Explicit)
    expected, other = cases.train_on(where, make, clean, AxisType.Explicit)
    assert state[0].skipped == 1
    assert other[0].skipped == 0
    for name, update in jax.device_get(updates).items():
        assert not np.any(update[2])
        np.testing.assert_array_equal(np.delete(update, 2, axis=0), expected[name])
    for mine, its in zip(
        jax.tree.leaves(state[0]._replace(count=0, skipped=0)),
        jax.tree.leaves(other[0]._replace(count=0, skipped=0)),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, its)


def test_pmap_with_averaged_gradients_gives_the_numbers_of_one_device():
    tx = cases.ALIASES["sparse_mfac"]()
    stacked = cases.gradients(8 * 3)
    per_device = jax.tree.map(lambda g: g.reshape(3, 8, *g.shape[1:]), stacked)
    mean = jax.tree.map(lambda g: g.mean(axis=1), per_device)
    expected, _ = jax.jit(functools.partial(cases.train, tx))(cases.params(), mean)

    def step(params, state, gradient):
        gradient = jax.lax.pmean(gradient, "devices")
        return tx.update(gradient, state, params)

    copies = jax.tree.map(lambda p: np.stack([p] * 8), cases.params())
    state = jax.pmap(tx.init)(copies)
    run = jax.pmap(step, axis_name="devices")
    for t in range(3):
        gradient = jax.tree.map(lambda g, t=t: g[t], per_device)
        updates, state = run(copies, state, gradient)
        for name, update in jax.device_get(updates).items():
            for device in range(8):
                error = np.abs(update[device] - expected[name][t]).max()
                assert error < TOLERANCE * np.abs(expected[name][t]).max()


def test_error_feedback_alone_feeds_any_optimizer_on_many_devices():
    compressor = efcp_jax.top_k(cases.DENSITY, block_size=cases.BLOCK)

    def make(sharding=None):
        return optax.chain(
            efcp_jax.error_feedback(compressor, sharding=sharding), optax.adam(0.1)
        )

    where = cases.PLACINGS["data"]
    one, _ = jax.jit(functools.partial(cases.train, make()))(
        cases.params(), cases.gradients()
    )
    for kind in (AxisType.Explicit, AxisType.Auto):
        many, _ = cases.train_on(where, make, cases.gradients(), kind)
        assert cases.worst(cases.vectors(many), cases.vectors(one)) < TOLERANCE

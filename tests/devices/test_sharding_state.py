"""Where the state lives, on which devices it can go on, and what is refused."""

import jax
import jax.numpy as jnp
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec as P,
    SingleDeviceSharding,
)
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import sharding_cases as cases

import efcp_jax
from efcp_jax.sharding import abstract_state, reshard_state, state_shardings


MODEL = {"a": {"w": (16, 8), "b": (8,)}, "c": (4, 8, 2)}
SPECS = {"a": {"w": P("x", "y"), "b": P("y")}, "c": P(None, "x")}


def is_shape(node):
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


def mesh_of(kind=AxisType.Explicit, shape=(4, 2), names=("x", "y")):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, (kind,) * len(shape), devices=devices)


def sharding_tree(mesh, specs=SPECS):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def params_on(mesh, specs=SPECS):
    zeros = jax.tree.map(lambda s: np.zeros(s, np.float32), MODEL, is_leaf=is_shape)
    return jax.device_put(zeros, sharding_tree(mesh, specs))


def chains(sharding=None):
    """Return optimizers that wrap this package's transformations in every way."""
    sparse = efcp_jax.top_k(0.25, block_size=4)
    only_a = {"a": True, "c": False}
    return {
        "momentum and decay": efcp_jax.sparse_mfac(
            0.1, 3, 0.5, momentum=0.9, weight_decay=0.1, sharding=sharding
        ),
        "feedback and adam": optax.chain(
            optax.clip_by_global_norm(1.0),
            efcp_jax.error_feedback(sparse, sharding=sharding),
            optax.adam(0.1),
        ),
        "masked": optax.masked(
            efcp_jax.low_rank_mfac(0.1, 3, 2, momentum=0.9, sharding=sharding), only_a
        ),
        "partition": optax.partition(
            {
                "one": efcp_jax.ggt(0.1, 3, sharding=sharding),
                "other": efcp_jax.low_rank_ggt(
                    0.1, 3, 2, block_diagonal=True, sharding=sharding
                ),
            },
            {"a": {"w": "one", "b": "other"}, "c": "other"},
        ),
        "injected": optax.inject_hyperparams(
            efcp_jax.mfac, static_args=("window_size", "sharding")
        )(0.1, window_size=3, sharding=sharding),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, AxisType.Explicit) for name in chains()]
    + [(name, AxisType.Auto) for name in ("momentum and decay", "masked", "partition")],
)
def test_state_shardings_are_those_of_the_state(name, kind):
    mesh = mesh_of(kind)
    shardings = sharding_tree(mesh)
    tx = chains(None if kind == AxisType.Explicit else shardings)[name]
    params = params_on(mesh)
    expected = state_shardings(tx, params)
    abstract = abstract_state(tx, params)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=expected)(params)
        _, following = jax.jit(tx.update)(params, state, params)
    for made in (state, following):
        assert jax.tree.structure(made) == jax.tree.structure(expected)
        for leaf, at, shape in zip(
            *map(jax.tree.leaves, (made, expected, abstract)), strict=True
        ):
            assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
            assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
    if kind == AxisType.Explicit:  # outside of jit, without an ambient mesh
        for leaf, at in zip(
            *map(jax.tree.leaves, (tx.init(params), expected)), strict=True
        ):
            # Other transformations make their counters on one device.
            assert not leaf.ndim or leaf.sharding.is_equivalent_to(at, leaf.ndim)
        abstract_only = jax.eval_shape(tx.init, params)
        assert jax.tree.structure(abstract_only) == jax.tree.structure(expected)


def test_momentum_gets_the_sharding_of_its_parameter_and_counters_none():
    mesh = mesh_of()
    tx = efcp_jax.mfac(0.1, 3, momentum=0.9)
    found = state_shardings(tx, params_on(mesh))
    assert found[0].window.rows.spec == P(("x", "y"))
    assert found[0].gram.spec == found[0].count.spec == P()
    alike = jax.tree.map(
        NamedSharding.is_equivalent_to,
        found[1].trace,
        sharding_tree(mesh),
        jax.tree.map(len, MODEL, is_leaf=is_shape),
    )
    assert all(jax.tree.leaves(alike))


def test_one_device_needs_no_mesh():
    params = {"w": jnp.zeros((3, 4))}
    tx = efcp_jax.sparse_mfac(0.1, 2, momentum=0.9)
    found = jax.tree.leaves(state_shardings(tx, params))
    assert set(found) == {SingleDeviceSharding(jax.devices()[0])}
    jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)


def test_a_partition_spec_takes_the_ambient_mesh():
    mesh = mesh_of(AxisType.Auto)
    params = params_on(mesh)
    tx = efcp_jax.scale_by_mfac(3, sharding=SPECS)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
    expected = NamedSharding(mesh, P(("x", "y")))
    assert state.window.rows.sharding.is_equivalent_to(expected, 3)
    with pytest.raises(ValueError, match=r"jax\.set_mesh"):
        tx.init(params)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            {"a": P("x"), "c": P(None, None, "x")},
            r"not fit params\['c'\] of shape \(4, 8, 2\)",
        ),
        ({"a": {"w": P("x"), "b": P("x", "y")}, "c": P()}, r"\['b'\].*more entries"),
        ({"a": P("z"), "c": P()}, r"not fit params\['a'\]\['b'\].*z"),
        ({"a": {"w": P("x"), "b": P()}}, r"no entry for the parameter params\['c'\]"),
        ({"a": P("x"), "c": P("x", "x")}, r"P\('x', 'x'\) does not fit params\['c'\]"),
    ],
)
def test_a_sharding_that_does_not_fit_names_the_leaf(specs, message):
    tx = efcp_jax.scale_by_mfac(3, sharding=specs)
    params = params_on(mesh_of(AxisType.Auto))
    with (
        jax.set_mesh(mesh_of(AxisType.Auto)),
        pytest.raises(ValueError, match=message),
    ):
        tx.init(params)


def test_something_else_than_a_sharding_is_refused():
    tx = efcp_jax.scale_by_mfac(3, sharding={"a": "x", "c": P()})
    with pytest.raises(TypeError, match=r"NamedShardings.*'x'"):
        tx.init(params_on(mesh_of(AxisType.Auto)))


def test_a_state_is_spread_where_nothing_says_how_parameters_are_divided():
    params = params_on(mesh_of(AxisType.Auto))
    found = state_shardings(efcp_jax.mfac(0.1, momentum=0.5), params)
    assert found[0].window.rows.spec == P(("x", "y"))
    assert found[1].trace["a"]["w"].spec == SPECS["a"]["w"]


# Runs that save on some devices and go on with others: blocks of the same entries, or
# no blocks at all, so results are equal.
def partitions(names):
    return {
        n: {"data": P(), "rows": P("x"), "columns": P(None, "x")}[names] for n in "uv"
    }


RESTARTS = [
    ("sparse_mfac", ("data", 8), ("data", 3)),
    ("sparse_ggt", ("data", 3), ("data", 1)),
    ("sparse_mfac", ("rows", 4), ("rows", 2)),
    ("bfloat16", ("data", 8), ("columns", 4)),
    ("low_rank_mfac", ("rows", 8), ("columns", 3)),
]


def optimizer(name):
    if name == "bfloat16":
        return efcp_jax.mfac(1.0, cases.WINDOW, value_dtype=jnp.bfloat16, momentum=0.5)
    return cases.ALIASES[name]()


@pytest.mark.parametrize(("name", "before", "after"), RESTARTS)
def test_a_restart_on_other_devices_goes_on_with_equal_results(
    name, before, after, tmp_path
):
    tx = optimizer(name)
    generator = np.random.default_rng(0)
    # One leaf of whole tiles a device, so that blocks align over its rows; two for what
    # has no blocks.
    aligned = name.startswith("sparse") and before[0] == "rows"
    names, shape = ("u", (64, 64)) if aligned else ("uv", (24, 24))
    stacked = {n: generator.normal(size=(7, *shape)).astype(np.float32) for n in names}

    def place(kind, count):
        mesh = mesh_of(shape=(count,), names=("x",))
        specs = {n: partitions(kind)[n] for n in names}
        shardings = sharding_tree(mesh, specs)
        zeros = {n: np.zeros(shape, np.float32) for n in names}
        return jax.device_put(zeros, shardings), shardings

    def steps(params, shardings, state, numbers):
        update, results = jax.jit(tx.update), []
        for t in numbers:
            gradient = jax.device_put({n: stacked[n][t] for n in names}, shardings)
            updates, state = update(gradient, state, params)
            results.append(np.concatenate([*map(np.ravel, updates.values())]))
        return results, state

    params, shardings = place(*before)
    _, state = steps(params, shardings, tx.init(params), range(4))
    expected, _ = steps(params, shardings, state, range(4, 7))
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(tmp_path / "state", state)

    # The devices that saved it are gone; their number and the partition are known.
    gone = AbstractMesh((before[1],), ("x",), (AxisType.Explicit,))
    saved = {
        n: jax.ShapeDtypeStruct(
            p.shape, p.dtype, sharding=NamedSharding(gone, shardings[n].spec)
        )
        for n, p in params.items()
    }
    item = abstract_state(tx, saved)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    restored = checkpointer.restore(
        tmp_path / "state",
        args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy),
    )
    params, shardings = place(*after)
    state = reshard_state(restored, (tx, saved), (tx, params))
    for leaf, at in zip(
        *map(jax.tree.leaves, (state, state_shardings(tx, params))), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
    found, _ = steps(params, shardings, state, range(4, 7))
    assert cases.worst(found, expected) < 100 * np.finfo(np.float32).eps


@pytest.mark.slow
def test_rows_move_between_ways_to_store_entries():
    """Offsets of an eighth of the parameters fit a word, those of all do not."""
    size, ways = 80_000, 8
    tx = efcp_jax.scale_by_mfac(
        3, compressor=efcp_jax.top_k(0.01, value_dtype=jnp.bfloat16)
    )
    on = lambda count: jax.device_put(
        {"w": np.zeros(size, np.float32)},
        NamedSharding(mesh_of(shape=(count,), names=("x",)), P()),
    )
    many, one = on(ways), on(1)
    state, generator = tx.init(many), np.random.default_rng(0)
    for _ in range(2):
        gradient = {"w": generator.standard_normal(size).astype(np.float32)}
        gradient = jax.device_put(gradient, many["w"].sharding)
        _, state = jax.jit(tx.update)(gradient, state, many)
    words = np.asarray(state.window.rows)
    assert words.dtype == np.uint32
    moved = reshard_state(state, (tx, many), (tx, one)).window.rows
    words, values, offsets = (
        np.reshape(each, (len(each), 3, -1)) for each in (words, *moved)
    )
    assert offsets.dtype == np.int32
    before, after = (np.zeros((3, size), np.float32) for _ in range(2))
    for block, slot, entry in np.ndindex(words.shape):
        word = words[block, slot, entry]
        value = np.uint32(word << 16).view(np.float32)
        before[slot, block * (size // ways) + (word >> 16)] += value
    for slot, entry in np.ndindex(values.shape[1:]):
        after[slot, offsets[0, slot, entry]] += np.float32(values[0, slot, entry])
    assert np.count_nonzero(before[:2]) == 2 * ways * round(0.01 * size / ways)
    np.testing.assert_array_equal(before, after)


EIGHT_BITS = [jnp.int8, jnp.float8_e4m3fn]


def carried(dtype, size, before, after, density, spec):
    """Return two rows, as whole vectors, before and behind a move."""
    compressor = efcp_jax.top_k(density, block_size=4, value_dtype=dtype)
    tx = efcp_jax.scale_by_mfac(3, compressor=compressor)
    on = lambda count: jax.device_put(
        {"w": np.zeros(size, np.float32)},
        NamedSharding(mesh_of(shape=(count,), names=("x",)), spec),
    )
    old, new = on(before), on(after)
    state, generator = tx.init(old), np.random.default_rng(0)
    # The magnitude of gradients differs along the model.
    magnitude = 2.0 ** -np.linspace(0, 12, size)
    for _ in range(2):
        gradient = (magnitude * generator.normal(size=size)).astype(np.float32)
        gradient = jax.device_put({"w": gradient}, old["w"].sharding)
        _, state = jax.jit(tx.update)(gradient, state, old)
    moved = reshard_state(state, (tx, old), (tx, new))
    update, _ = jax.jit(tx.update)(
        jax.device_put({"w": np.ones(size, np.float32)}, new["w"].sharding), moved, new
    )
    assert np.isfinite(update["w"]).all()
    np.testing.assert_array_equal(
        *(np.ravel(each.error)[:size] for each in (state, moved))
    )

    def dense(rows, row):
        kept = slice(row * round(4 * density), (row + 1) * round(4 * density))
        scales = np.asarray(rows.scales).astype(np.float32)[:, row, None, None]
        values = np.asarray(rows.values).astype(np.float32)[:, kept] * scales
        vector = np.zeros((len(values), 4, values.shape[2]))
        tile, _, lane = np.indices(values.shape)
        np.add.at(vector, (tile, np.asarray(rows.offsets)[:, kept], lane), values)
        return vector.reshape(-1)[:size]

    return [
        np.stack([dense(each.window.rows, row) for row in range(2)])
        for each in (state, moved)
    ]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("after", [1, 3])
def test_values_of_eight_bits_move_as_they_are_with_their_tiles(dtype, after):
    # 1024 blocks, a tile a device.
    before, behind = carried(dtype, 4096, 8, after, 0.25, P())
    assert np.count_nonzero(before) > 1000
    np.testing.assert_array_equal(before, behind)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_values_of_eight_bits_are_rounded_where_tiles_are_others(dtype):
    # 18 blocks a device; there one tile of 128 blocks and another.
    values, moved = carried(dtype, 576, 8, 1, 1.0, P("x"))
    each = np.split(moved, [512], axis=1)
    peaks = np.stack([np.abs(part).max(axis=1) for part in each], axis=1)
    step = 2.0 ** np.ceil(np.log2(peaks))
    step = step[:, (np.arange(576) >= 512).astype(int)] / 128
    error = np.abs(moved - values)
    if dtype == jnp.int8:
        assert error.max() > 0
        assert (error <= step / 2).all()
    else:  # the range of exponents is wide enough
        assert (error <= np.maximum(np.abs(values) / 16, step / 2**10)).all()


def test_equal_shapes_restore_directly_onto_other_devices(tmp_path):
    tx = cases.ALIASES["sparse_mfac"]()
    params = {n: jnp.zeros((256, 8)) for n in "uv"}  # 1024 blocks, a tile a device
    on = lambda count: jax.device_put(
        params, NamedSharding(mesh_of(shape=(count,), names=("x",)), P())
    )
    many, few = on(8), on(4)
    gradient = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(0), p.shape), params
    )
    _, state = jax.jit(tx.update)(
        jax.device_put(gradient, many["u"].sharding), tx.init(many), many
    )
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    target = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        abstract_state(tx, few),
        state_shardings(tx, few),
    )
    restored = checkpointer.restore(tmp_path / "state", target)
    for leaf, other in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        assert len(leaf.sharding.device_set) == 4
        np.testing.assert_array_equal(leaf, other)


def test_first_entries_of_blocks_with_room_left_are_not_lost():
    tx = efcp_jax.scale_by_mfac(2, compressor=efcp_jax.top_k(0.5, block_size=8))
    gradient = jnp.zeros((8, 6)).at[jnp.array([0, 2, 4, 5]), jnp.array([0, 1, 0, 5])]
    one, mesh = jnp.zeros((8, 6)), mesh_of(shape=(2,), names=("x",))
    two = jax.device_put(one, NamedSharding(mesh, P(None, "x")))
    _, state = tx.update(gradient.set(3.0), tx.init(one), one)
    there = reshard_state(state, (tx, one), (tx, two))
    back = reshard_state(there, (tx, two), (tx, one))
    for each in (state, there, back):
        assert np.count_nonzero(each.window.rows.values) == 4


def test_kept_entries_that_find_no_room_are_refused():
    tx = cases.ALIASES["sparse_mfac"]()
    placings = [cases.PLACINGS[name] for name in ("fsdp", "tensor")]
    models = [
        jax.device_put(cases.params(), p.shardings(p.make_mesh())) for p in placings
    ]
    _, state = cases.train_on(
        placings[0], cases.ALIASES["sparse_mfac"], cases.gradients(), AxisType.Explicit
    )
    with pytest.raises(ValueError, match="room for 1"):
        reshard_state(state, (tx, models[0]), (tx, models[1]))
    with pytest.raises(ValueError, match="not made for `source`"):
        reshard_state(state, (tx, cases.params()), (tx, models[1]))
    with pytest.raises(ValueError, match="reshard_state"):
        tx.update(cases.params(), state, cases.params())

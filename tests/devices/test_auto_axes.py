"""Parameters on a mesh with Auto axes, and nobody says how they are sharded."""

import contextlib
import functools
import itertools

from collectives import collectives
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest
import sharding_cases as cases

import efcp_jax
from efcp_jax.compressors.blocks import Blocks
from efcp_jax.devices import placement, positions
from efcp_jax.sharding import reshard_state, state_shardings


TOLERANCE = 100 * np.finfo(np.float32).eps

PLACINGS = ("data", "fsdp", "tensor", "fsdp x tensor", "tensor and data")
# Every alias in every way to call, each placing among them. Every third or fifth of
# them meets all of these too.
CALLS = [
    (alias, PLACINGS[(i + j) % len(PLACINGS)], *how)
    for i, alias in enumerate(cases.ALIASES)
    for j, how in enumerate(itertools.product(("jit", "eager"), (False, True)))
]
PLACES = [(alias, where, "jit", False) for alias in cases.ALIASES for where in PLACINGS]


@pytest.fixture
def divided(monkeypatch):
    """Divide small trees as large ones."""
    monkeypatch.setattr(placement, "GATHERED", 0)


@functools.cache
def one_device(alias):
    run = jax.jit(functools.partial(cases.train, cases.ALIASES[alias]()))
    return cases.vectors(run(cases.params(), cases.gradients())[0])


def on_mesh(where):
    """Return the mesh, the shardings of the parameters, and parameters there."""
    mesh = where.make_mesh(AxisType.Auto)
    shardings = where.shardings(mesh)
    return mesh, shardings, jax.device_put(cases.params(), shardings)


def bytes_a_device(tree):
    shards = [leaf.addressable_shards for leaf in jax.tree.leaves(tree)]
    return sum(s.data.nbytes for s in itertools.chain(*shards) if s.device.id == 0)


def train(tx, where, how, ambient):
    """Return the updates of all steps, and the last state."""
    mesh, shardings, params = on_mesh(where)
    update = lambda *args: tx.update(*args)  # compiles for itself
    if how == "jit":
        update = jax.jit(update, donate_argnums=1)
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        state, updates = tx.init(params), []
        for t in range(cases.STEPS):
            gradient = {name: g[t] for name, g in cases.gradients().items()}
            each, state = update(jax.device_put(gradient, shardings), state, params)
            updates.append(each)
            for name, leaf in each.items():
                assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)
    assert how == "eager" or update._cache_size() == 1
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *updates)
    return cases.vectors(stacked), state


@pytest.mark.parametrize(("alias", "placing", "how", "ambient"), CALLS[::3])
def test_a_small_tree_gives_the_numbers_of_one_device(alias, placing, how, ambient):
    values, state = train(cases.ALIASES[alias](), cases.PLACINGS[placing], how, ambient)
    assert state[0].skipped == 0
    assert cases.worst(values, one_device(alias)) < TOLERANCE


def chosen(where):
    shapes = [(shape, np.float32) for shape in cases.SHAPES.values()]
    specs, padded = placement.divide(shapes, where.mesh)
    assert list(padded) == list(cases.SHAPES.values())
    return cases.Placing(where.mesh, dict(zip(cases.SHAPES, specs, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alias", "placing", "how", "ambient"), sorted({*CALLS[::5], *PLACES[::2]})
)
def test_a_large_tree_is_divided_and_gives_the_textbooks_numbers(
    alias, placing, how, ambient, divided
):
    where = cases.PLACINGS[placing]
    values, state = train(cases.ALIASES[alias](), where, how, ambient)
    assert state[0].skipped == 0
    if alias.startswith("low_rank"):
        expected = one_device(alias)
    else:
        expected = cases.oracle(alias, chosen(where), cases.gradients())
    assert cases.worst(values, expected) < TOLERANCE


@pytest.mark.parametrize("alias", ["mfac", "sparse_mfac", "low_rank_ggt"])
@pytest.mark.parametrize("placing", [*PLACINGS, "mixed"])
def test_the_state_is_spread_donated_and_never_gathered(placing, alias, divided):
    where = cases.PLACINGS[placing]
    _, shardings, params = on_mesh(where)
    tx = cases.ALIASES[alias]()
    told = jax.jit(cases.ALIASES[alias](sharding=shardings).init)(params)
    state = tx.init(params)
    assert bytes_a_device(state) <= bytes_a_device(told)
    step = jax.jit(lambda *args: tx.update(*args), donate_argnums=1)
    program = step.lower(params, state, params).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == bytes_a_device(state)
    total = sum(map(np.prod, cases.SHAPES.values()))
    moved = [size for kind, size in collectives(program) if kind != "all-reduce"]
    largest = max(map(np.prod, cases.SHAPES.values()))
    assert max(moved, default=0) <= largest
    # To the division and back, or the update to every device.
    assert sum(moved) <= 2 * total
    for other in (jax.jit(tx.init)(params), jax.eval_shape(tx.init, params)):
        assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, state)
    where_it_is = jax.tree.map(lambda leaf: leaf.sharding, state)
    same = jax.tree.map(
        lambda at, like, leaf: at.is_equivalent_to(like, leaf.ndim),
        (jax.tree.map(lambda x: x.sharding, jax.jit(tx.init)(params)))[0],
        where_it_is[0],
        state[0],
    )
    assert all(jax.tree.leaves(same))
    for at, leaf in zip(
        *map(jax.tree.leaves, (state_shardings(tx, params), state)), strict=True
    ):
        assert not leaf.ndim or at.is_equivalent_to(leaf.sharding, leaf.ndim)


HOST = {
    "b": np.linspace(-1, 1, 8, dtype=np.float32),
    "w": np.sin(np.arange(64 * 32, dtype=np.float32)).reshape(64, 32),
}


def loss(params, inputs):
    return jnp.mean(jnp.tanh(inputs @ params["w"] + jnp.sum(params["b"])) ** 2)


def descend(params, state, inputs, tx, steps=5):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, inputs):
        updates, state = tx.update(jax.grad(loss)(params, inputs), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state, inputs)
    return params, step._cache_size()


@pytest.mark.parametrize("spec", [P(), P("x"), None], ids=str)
def test_parameters_stay_where_they_are(spec):
    tx = efcp_jax.sparse_mfac(1.0, 4, 1 / 16, 0.1, block_size=64)
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    inputs = np.cos(np.arange(16 * 64, dtype=np.float32)).reshape(16, 64)
    spread = jax.device_put(inputs, NamedSharding(mesh, P("x")))
    on_one = jax.tree.map(jnp.asarray, HOST)
    expected, _ = descend(jax.tree.map(jnp.copy, on_one), tx.init(HOST), inputs, tx)
    if spec is None:  # not put on the mesh: the first step brings them there
        found, compilations = descend(on_one, tx.init(on_one), spread, tx)
        assert compilations == 2
    else:
        params = jax.device_put(HOST, NamedSharding(mesh, spec))
        found, compilations = descend(params, jax.jit(tx.init)(params), spread, tx)
        assert compilations == 1
    for name, leaf in found.items():
        at = NamedSharding(mesh, spec or P())
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5)


ODD = {"c": ((3, 5), np.complex64), "s": ((), np.float32), "w": ((7, 5), np.float32)}


def odd(seed):
    generator = np.random.default_rng(seed)
    return {
        name: np.asarray(generator.normal(size=shape) + 1).astype(dtype)
        for name, (shape, dtype) in ODD.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("alias", ["mfac", "low_rank_ggt"])
def test_what_does_not_divide_is_padded_and_carried_over(alias, divided):
    tx = cases.ALIASES[alias]()

    def on(shape):
        names = ("x", "y")[: len(shape)]
        kinds = (AxisType.Auto,) * len(shape)
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = jax.make_mesh(shape, names, kinds, devices=devices)
        return jax.device_put(odd(0), NamedSharding(mesh, P()))

    def steps(params, state, numbers):
        results = []
        for t in numbers:
            gradient = jax.tree.map(
                lambda g, p: jax.device_put(g, p.sharding), odd(t), params
            )
            updates, state = jax.jit(tx.update)(gradient, state, params)
            results.append(
                np.concatenate(
                    [*map(np.ravel, jax.device_get(jax.tree.leaves(updates)))]
                )
            )
        return results, state

    many, other, one = on((8,)), on((3, 2)), odd(0)
    expected, _ = steps(jax.device_put(one), tx.init(one), range(6))
    found, state = steps(many, tx.init(many), range(3))
    moved = reshard_state(state, (tx, many), (tx, other))
    for values in (
        steps(many, state, range(3, 6))[0],
        steps(other, moved, range(3, 6))[0],
    ):
        for a, b in zip([*found, *values], expected, strict=True):
            assert (
                np.abs(a - b).max() < 1e3 * np.finfo(np.float32).eps * np.abs(b).max()
            )


@pytest.mark.parametrize("size", [1, 3, 4, 8, 16, 64, None])
@pytest.mark.parametrize("tile", [1, 4, 128])
@pytest.mark.parametrize("mesh", [{"x": 8}, {"x": 4, "y": 2}], ids=str)
def test_a_shape_of_one_device_is_that_of_its_order(mesh, tile, size, divided):
    axes = jax.make_mesh(
        tuple(mesh.values()), tuple(mesh), (AxisType.Auto,) * len(mesh)
    )
    for shapes in ([(16, 8)], [(32,), (8, 16)], [(64, 64), (8,)], [(7, 5)]):
        tree = [np.zeros(shape, np.float32) for shape in shapes]
        found = placement.divide([(s, np.float32) for s in shapes], mesh)
        placed = placement.Placement(axes, *found)
        many, one = (
            positions.of_blocks(
                Blocks.of(placement.layout(tree, np.float32, each), size, tile)
            )
            for each in (placed, None)
        )
        assert many.shape != one.shape or np.array_equal(many, one)
        held = many[many >= 0]
        np.testing.assert_array_equal(np.sort(held), np.sort(one[one >= 0]))

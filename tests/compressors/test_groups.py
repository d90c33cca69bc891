"""Leaves of equal matrices are one batch, and get what each would get by itself."""

from flax import nnx
import flax.serialization
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import efcp_jax
from efcp_jax.sharding import reshard_state


RANK = 2
WINDOW = 3
STEPS = 5  # the window has wrapped
SHAPES = {
    "a": (12, 9),
    "b": {"kernel": (3, 4, 9), "bias": (9,), "gain": ()},
    "c": (9, 12),
    "d": (12, 9),
    "waves": (12, 5),
    "small": (3, 3),
}
COMPLEX = ("waves",)
# Three axes are a matrix of the last against all others; a complex matrix holds real
# and imaginary parts side by side. Vectors, scalars and small matrices are kept whole.
MATRICES = {"12x9": 3, "9x12": 1, "12x10": 1}
WHOLE = {"9": 1, "1": 1, "3x3": 1}


def is_shape(node):
    return isinstance(node, tuple)


def params():
    zeros = lambda s: jnp.zeros(s)
    tree = jax.tree.map(zeros, SHAPES, is_leaf=is_shape)
    return tree | {name: tree[name].astype(jnp.complex64) for name in COMPLEX}


def gradients(like=None, steps=STEPS):
    rng = np.random.default_rng(3)

    def draw(leaf):
        value = rng.normal(size=leaf.shape)
        if jnp.iscomplexobj(leaf):
            value = value + 1j * rng.normal(size=leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    like = params() if like is None else like
    return [jax.tree.map(draw, like) for _ in range(steps)]


def make(block_diagonal=False, sharding=None, window=WINDOW, rank=RANK):
    return efcp_jax.scale_by_mfac(
        window,
        0.1,
        compressor=efcp_jax.low_rank(rank),
        block_diagonal=block_diagonal,
        sharding=sharding,
    )


def run(tx, steps):
    state, update, updates = tx.init(steps[0]), jax.jit(tx.update), []
    for gradient in steps:
        result, state = update(gradient, state, gradient)
        updates.append(result)
    return updates, state


def worst(found, expected):
    """Return the largest difference, relative to the largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(b)))
        for a, b in pairs
    )


@pytest.mark.parametrize("block_diagonal", [False, True])
def test_leaves_of_one_shape_are_a_batch(block_diagonal):
    state = make(block_diagonal).init(params())
    sizes = lambda arrays: {name: len(array) for name, array in arrays.items()}
    assert sizes(state.error) == MATRICES | WHOLE
    rows = state.window.rows.parts
    assert rows["12x9"].left.shape == (3, WINDOW * RANK, 12)
    assert rows["12x9"].right.shape == (3, WINDOW * RANK, 9)
    assert rows["3x3"].shape == (1, WINDOW, 9)
    # What is kept whole has no basis.
    assert sizes(state.basis) == MATRICES
    if block_diagonal:
        assert sizes(state.gram) == MATRICES | WHOLE


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_a_block_diagonal_step_is_the_step_of_each_leaf_by_itself(rank):
    shapes = [(30, 25), (25, 30), (30, 25), (7,), (30, 25)]
    steps = gradients([jnp.zeros(shape) for shape in shapes])
    updates, _ = run(make(True, rank=rank), steps)
    for i in range(len(shapes)):
        alone, _ = run(make(rank=rank), [step[i] for step in steps])
        assert worst([u[i] for u in updates], alone) < 1e-5


def test_one_gram_is_the_sum_over_the_leaves():
    steps = gradients()
    _, state = run(make(), steps)
    _, diagonal = run(make(True), steps)
    total = sum(np.sum(gram, axis=0) for gram in jax.tree.leaves(diagonal.gram))
    np.testing.assert_allclose(state.gram, total, rtol=1e-5)


def test_the_program_does_not_grow_with_the_number_of_equal_leaves():
    def operations(count):
        tree = [jnp.zeros((12, 9))] * count + [jnp.zeros(9)] * count
        tx = make()
        text = jax.jit(tx.update).lower(tree, tx.init(tree), tree).as_text()
        heavy = r"dot_general|reduce\(|cholesky|custom_call|while|case|rng|sqrt"
        return {op: text.count(op) for op in heavy.split("|")}

    assert operations(2) == operations(20)


@pytest.mark.slow
def test_runs_of_leaves_are_the_batch():
    """Trees that are too large for one run are updated a few leaves at a time."""
    like = [jnp.zeros((128, 160))] * 11 + [jnp.zeros((300, 300)), jnp.zeros(50_000)]
    steps = gradients(like, 3)
    updates, _ = run(make(), steps)
    many = make()
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):  # one device of a mesh takes whole batches
        placed = jax.device_put(steps, NamedSharding(mesh, P()))
        expected, _ = run(many, placed)
    assert worst(updates, jax.device_get(expected)) < 1e-5


@pytest.mark.parametrize("block_diagonal", [False, True])
def test_map_params_gives_the_structure_of_the_state(block_diagonal):
    tx = optax.chain(make(block_diagonal), optax.trace(0.5))
    state = tx.init(params())
    # Fields whose structure is that of the parameters come whole.
    other = lambda field: jax.tree.map(lambda _: "other", field)
    mapped = optax.tree.map_params(
        tx, lambda leaf: "mirror", state, transform_non_params=other
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert set(jax.tree.leaves(mapped[0])) == {"other"}
    assert set(jax.tree.leaves(mapped[1])) == {"mirror"}
    # The next state has the structure of its own parameters.
    other = tx.init(jnp.zeros((4, 5)))
    mapped = optax.tree.map_params(tx, jnp.ones_like, other)
    assert jax.tree.structure(mapped) == jax.tree.structure(other)


@pytest.mark.parametrize("like", [params(), [jnp.zeros(3), jnp.zeros(())]], ids=str)
@pytest.mark.parametrize("block_diagonal", [False, True])
def test_states_go_through_checkpoints(like, block_diagonal, tmp_path):
    tx = make(block_diagonal)
    _, state = run(tx, gradients(like, 2))
    like_state = jax.eval_shape(tx.init, like)
    data = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(tx.init(like), data)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            like_state,
        )
        orbax = checkpointer.restore(tmp_path / "state", target)
    for found in (restored, orbax):
        assert jax.tree.structure(found) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, found, state)


def test_an_nnx_optimizer_holds_the_groups():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(12, 12, rngs=rngs) for _ in range(3)])

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    model = Model()
    tx = efcp_jax.low_rank_mfac(0.1, WINDOW, RANK)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (8, 12))

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x) - 0.5) ** 2)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer))]
    assert (3, WINDOW * RANK, 12) in shapes


# Five leaves of one shape that lie on the devices in three ways.
SPECS = {"a": P("x"), "b": P(None, "x"), "c": P("x"), "d": P(), "e": P(None, "x")}


def on_mesh(count, tree, specs=SPECS):
    mesh = jax.make_mesh((count,), ("x",), axis_types=(AxisType.Explicit,))
    return jax.device_put(
        tree, {name: NamedSharding(mesh, specs[name]) for name in tree}
    )


@pytest.mark.slow
@pytest.mark.parametrize("block_diagonal", [False, True])
def test_one_shape_in_several_placements_is_several_groups(block_diagonal):
    like = {name: jnp.zeros((16, 24)) for name in SPECS}
    steps, tx = gradients(like), make(block_diagonal)
    expected, one = run(tx, steps)
    assert one.error.keys() == {"16x24"}
    updates, state = run(tx, [on_mesh(4, step) for step in steps])
    assert state.error.keys() == {"16x24", "16x24-2", "16x24-3"}
    assert [len(batch) for batch in state.error.values()] == [2, 2, 1]
    assert worst(jax.device_get(updates), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("block_diagonal", [False, True])
def test_states_move_between_devices_with_other_groups(block_diagonal):
    like = {name: jnp.zeros((16, 24)) for name in SPECS} | {"v": jnp.zeros(10)}
    specs = SPECS | {"v": P()}
    tx, steps = make(block_diagonal), gradients(like, STEPS + 2)
    expected, _ = run(tx, steps)
    _, state = run(tx, [on_mesh(8, step, specs) for step in steps[:STEPS]])
    gone = AbstractMesh((8,), ("x",), (AxisType.Explicit,))
    saved = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(gone, specs[name])
        )
        for name, leaf in like.items()
    }
    flipped = specs | {"a": P(None, "x"), "b": P("x"), "d": P("x")}
    for place in (lambda tree: tree, lambda tree: on_mesh(2, tree, flipped)):
        moved = reshard_state(jax.device_get(state), (tx, saved), (tx, place(like)))
        for gradient, wanted in zip(steps[STEPS:], expected[STEPS:], strict=True):
            update, moved = jax.jit(tx.update)(place(gradient), moved, place(like))
            assert worst(jax.device_get(update), wanted) < 1e-5

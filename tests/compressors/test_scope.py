"""A Gram matrix for each leaf: the step of every leaf by itself."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import efcp_jax


SHAPES = [(6, 5), (30,), (), (5, 6), (40,)]
WINDOW, STEPS = 3, 7
LABELS = ["thin", "sparse", "rest", "thin", "sparse"]
COMPRESSORS = {
    "identity": efcp_jax.identity(),
    "low_rank": efcp_jax.low_rank(2),
    "blocks": efcp_jax.top_k(0.25, block_size=8),
    "bytes": efcp_jax.top_k(0.25, block_size=8, value_dtype=jnp.int8),
    "global": efcp_jax.top_k(0.2),
}
COMPRESSORS["by_label"] = efcp_jax.by_label(
    {
        "thin": COMPRESSORS["low_rank"],
        "sparse": COMPRESSORS["blocks"],
        "rest": COMPRESSORS["identity"],
    },
    LABELS,
)
EACH = {"thin": "low_rank", "sparse": "blocks", "rest": "identity"}
every_compressor = pytest.mark.parametrize("kind", COMPRESSORS)
SCALES = {
    "mfac": lambda **kw: efcp_jax.scale_by_mfac(WINDOW, 0.1, **kw),
    "ggt": lambda **kw: efcp_jax.scale_by_ggt(WINDOW, 1e-2, **kw),
}


def gradients(steps=STEPS):
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return [[draw(shape) for shape in SHAPES] for _ in range(steps)]


def run(tx, steps, state=None):
    state = tx.init(steps[0]) if state is None else state
    update, updates = jax.jit(tx.update), []
    for gradient in steps:
        result, state = update(gradient, state, gradient)
        updates.append(jax.device_get(result))
    return updates, state


def close(found, expected, rtol=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)


def fisher(rows, damping=0.1):
    """Return the M-FAC update of the newest of `rows`, in float64 and in full."""
    rows = np.asarray(rows, np.float64)
    matrix = damping * np.eye(rows.shape[1]) + rows.T @ rows / WINDOW
    return np.linalg.solve(matrix, rows[-1])


def adagrad(rows, eps=1e-2):
    """Return the GGT update of the newest of `rows`, in float64 and in full."""
    rows = np.asarray(rows, np.float64)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    root = np.sqrt(np.maximum(values, 0))
    return vectors @ (vectors.T @ rows[-1] / (root + eps))


@pytest.mark.parametrize(("name", "exact"), [("mfac", fisher), ("ggt", adagrad)])
def test_dense_steps_are_those_of_each_leaf_in_float64(name, exact):
    steps = gradients()
    updates, _ = run(SCALES[name](block_diagonal=True), steps)
    for t, update in enumerate(updates):
        for i, found in enumerate(update):
            kept = steps[max(0, t + 1 - WINDOW) : t + 1]
            rows = [np.ravel(step[i]) for step in kept]
            np.testing.assert_allclose(
                np.ravel(found), exact(rows), rtol=2e-3, atol=2e-4
            )


@pytest.mark.parametrize("name", SCALES)
@every_compressor
def test_a_step_is_the_step_of_each_leaf_by_itself(name, kind):
    compressor, steps = COMPRESSORS[kind], gradients()
    updates, _ = run(SCALES[name](compressor=compressor, block_diagonal=True), steps)
    for i, label in enumerate(LABELS):
        own = COMPRESSORS[EACH[label] if kind == "by_label" else kind]
        alone, _ = run(SCALES[name](compressor=own), [s[i] for s in steps])
        close([u[i] for u in updates], alone, 1e-3)


def test_dense_windows_keep_no_error_and_skip_what_is_not_finite():
    steps, tx = gradients(), SCALES["mfac"](block_diagonal=True)
    _, state = run(tx, steps)
    assert state.error is None
    broken = [leaf.at[...].set(jnp.nan) for leaf in steps[0]]
    (update,), after = run(tx, [broken], state)
    assert all(not np.any(leaf) for leaf in update)
    assert int(after.skipped) == 1
    close(after.gram, state.gram, 0)


# Blocks of shards hold other entries than those of whole leaves, unless all are kept.
MESH = {
    "identity": (COMPRESSORS["identity"], P("x")),
    "low_rank": (COMPRESSORS["low_rank"], P("x")),
    "everything": (efcp_jax.top_k(1.0, block_size=8), P("x")),
    "copies": (COMPRESSORS["identity"], P()),
    "blocks of copies": (COMPRESSORS["blocks"], P()),
    "by_label of copies": (COMPRESSORS["by_label"], P()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "metric"),
    [(case, None) for case in MESH]
    + [
        (case, efcp_jax.diagonal_metric())
        for case in ("everything", "blocks of copies")
    ],
)
def test_steps_on_a_mesh_are_those_on_one_device(case, metric):
    compressor, spec = MESH[case]
    given = {"metric": metric, "compressor": compressor}
    steps, tx = gradients(), SCALES["mfac"](block_diagonal=True, **given)
    expected, _ = run(tx, steps)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        place = lambda g: jax.device_put(
            g, NamedSharding(mesh, spec if g.shape and g.shape[0] % 2 == 0 else P())
        )
        found, _ = run(tx, jax.tree.map(place, steps))
    close(found, expected)


@every_compressor
def test_memory_counts_a_gram_for_each_leaf(kind):
    like = [jnp.zeros(shape) for shape in SHAPES]
    tx = SCALES["mfac"](block_diagonal=True, compressor=COMPRESSORS[kind])
    report = efcp_jax.memory_report(tx, like)
    assert report.fields["gram"] == len(SHAPES) * WINDOW**2 * 4


def test_products_with_the_inverse_are_those_of_each_leaf_in_float64():
    steps, tx = gradients(), SCALES["mfac"](block_diagonal=True)
    _, state = run(tx, steps)
    found = efcp_jax.inverse_fisher_product(
        steps[0], state, 0.1, compressor=efcp_jax.identity(), block_diagonal=True
    )
    for i, product in enumerate(found):
        rows = [np.ravel(step[i]) for step in steps[-WINDOW:]]
        rows = np.asarray(rows, np.float64)
        matrix = 0.1 * np.eye(rows.shape[1]) + rows.T @ rows / WINDOW
        exact = np.linalg.solve(matrix, np.ravel(np.float64(steps[0][i])))
        np.testing.assert_allclose(np.ravel(product), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, ("mfac", "ggt")[i % 2]) for i, kind in enumerate(COMPRESSORS)],
)
def test_training_goes_on_from_a_checkpoint_bit_by_bit(name, kind):
    compressor, steps = COMPRESSORS[kind], gradients(2 * WINDOW)
    tx = SCALES[name](block_diagonal=True, compressor=compressor)
    whole, end = run(tx, steps)
    _, middle = run(tx, steps[:4])
    data = flax.serialization.to_bytes(middle)
    restored = flax.serialization.from_bytes(tx.init(steps[0]), data)
    rest, last = run(tx, steps[4:], jax.tree.map(jnp.asarray, restored))
    chex.assert_trees_all_equal(rest, whole[4:])
    chex.assert_trees_all_equal(last, end)


# Values of 8 bits are rounded anew for other tiles, and one block of all is another
# block on every device, which is refused where entries do not fit.
@pytest.mark.parametrize("kind", ["identity", "low_rank", "blocks", "by_label"])
def test_states_move_to_other_devices_and_back(kind):
    tx = SCALES["mfac"](block_diagonal=True, compressor=COMPRESSORS[kind])
    steps = gradients(WINDOW + 1)
    _, state = run(tx, steps)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        place = lambda g: jax.device_put(g, NamedSharding(mesh, P()))
        there = jax.tree.map(place, steps)
        moved = efcp_jax.sharding.reshard_state(
            jax.device_get(state), source=(tx, steps[0]), target=(tx, there[0])
        )
        (found,), _ = run(tx, there[:1], moved)
        back = efcp_jax.sharding.reshard_state(
            jax.device_get(moved), source=(tx, there[0]), target=(tx, steps[0])
        )
    chex.assert_trees_all_equal(jax.device_get(back), jax.device_get(state))
    (following,), _ = run(tx, steps[:1], state)
    close(found, following)


@pytest.mark.parametrize("kind", ["identity", "low_rank", "blocks"])
def test_kernels_do_not_follow_the_number_of_leaves(kind):
    def operations(count):
        tree = [jnp.zeros((12, 9))] * count
        tx = SCALES["mfac"](block_diagonal=True, compressor=COMPRESSORS[kind])
        text = jax.jit(tx.update).lower(tree, tx.init(tree), tree).as_text()
        heavy = ("dot_general", "cholesky", "custom_call", "while", "case")
        return {word: text.count(word) for word in heavy}

    assert operations(2) == operations(20)

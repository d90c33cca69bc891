"""What people first met with other optimizers, and must not meet here."""

import itertools

import aliases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efcp_jax


every_alias = pytest.mark.parametrize("name", aliases.ALL)
COMPRESSORS = {
    "identity": efcp_jax.identity(),
    "top_k": efcp_jax.top_k(0.25),
    "top_k of small blocks": efcp_jax.top_k(0.25, block_size=8),
    "top_k, int8": efcp_jax.top_k(0.25, block_size=8, value_dtype=jnp.int8),
    "low_rank": efcp_jax.low_rank(2),
}
TREES = [
    {"b": jnp.ones(7), "w": jnp.ones((24, 40))},
    {"s": jnp.ones(()), "x": {"k": jnp.ones((3, 10, 17))}, "z": jnp.ones(3)},
    [jnp.ones((8, 8))] * 3,
    jnp.ones(5),
]


@every_alias
def test_states_and_gradients_of_numpy_are_stepped_as_arrays_of_jax(name):
    tx, params = aliases.make(name), aliases.params()
    here, there = tx.init(params), jax.device_get(tx.init(params))
    for gradient in aliases.gradients(params)[:2]:
        expected, here = tx.update(gradient, here, params)
        found, there = tx.update(*jax.device_get((gradient, there, params)))
        aliases.assert_equal(found, expected)
        aliases.assert_equal(there, here)
        there = jax.device_get(there)


@every_alias
def test_what_has_no_gradient_may_be_anything(name):
    tx, params = aliases.make(name), aliases.params()
    (gradient, *_) = aliases.gradients(params)
    state = tx.init(params)
    expected, _ = tx.update(gradient, state, params)
    model = {"arrays": params, "function": jnp.tanh, "layers": [jnp.tanh, 3]}
    gradients = {"arrays": gradient, "function": None, "layers": [None, None]}
    kept = {"arrays": params, "function": None, "layers": [None, None]}
    found, _ = tx.update(gradients, tx.init(kept), model)
    aliases.assert_equal(found, {**gradients, "arrays": expected})


@pytest.mark.parametrize("block_diagonal", [False, True])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_map_params_knows_nothing_of_other_trees(kind, block_diagonal):
    for metric, error in itertools.product(
        (None, efcp_jax.diagonal_metric()), (None, jnp.int8)
    ):
        make = lambda metric=metric, error=error: optax.chain(
            efcp_jax.scale_by_ggt(
                4,
                compressor=COMPRESSORS[kind],
                block_diagonal=block_diagonal,
                metric=metric,
                error_dtype=error,
            ),
            optax.trace(0.5),
        )
        tx = make()
        states = [jax.eval_shape(tx.init, tree) for tree in TREES]
        for state, tree in zip(states, TREES, strict=True):
            for each in (tx, make()):
                found = optax.tree.map_params(
                    each,
                    lambda leaf, name: name,
                    state,
                    jax.tree.map(lambda _: "param", tree),
                    transform_non_params=lambda field: jax.tree.map(
                        lambda _: "other", field
                    ),
                )
                names = jax.tree.map(lambda _: "other", state)
                momentum = jax.tree.map(lambda _: "param", state[1])
                assert found == (names[0], momentum)


@pytest.mark.parametrize("name", aliases.STRUCTURE)
def test_a_small_number_in_half_precision_is_not_zero(name):
    params = aliases.params("float16")
    given = aliases.hyperparameters(name) | {aliases.ridge(name): 1e-8}
    tx = optax.inject_hyperparams(
        getattr(efcp_jax, name), static_args=tuple(aliases.STRUCTURE[name])
    )(**given, **aliases.STRUCTURE[name])
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(params, state, params)
        assert float(state.hyperparams[aliases.ridge(name)]) == 0
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
        assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", aliases.STRUCTURE)
@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": jnp.float32(0.1)},
        {"learning_rate": np.float64(0.1), "momentum": jnp.float32(0.5)},
        {"weight_decay": jnp.float32(0.1), "momentum": lambda count: jnp.float32(0.5)},
    ],
    ids=["learning rate", "momentum", "weight decay"],
)
def test_updates_have_the_dtype_of_gradients_whatever_that_of_numbers(name, given):
    arguments = {"learning_rate": 0.1, **aliases.STRUCTURE[name], **given}
    tx = getattr(efcp_jax, name)(**arguments)
    params = aliases.params("bfloat16")
    state = first = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        for leaf in jax.tree.leaves(updates):
            assert leaf.dtype == jnp.bfloat16
        assert aliases.types(state) == aliases.types(first)


@pytest.mark.parametrize("name", aliases.STRUCTURE)
def test_a_state_lives_where_the_parameters_are_committed(name):
    device = jax.devices()[2]
    params = jax.device_put(aliases.params(), device)
    tx = aliases.make(name)
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    for leaf in jax.tree.leaves((state, updates, after)):
        assert leaf.devices() == {device}
    free = tx.init(aliases.params())
    assert not any(leaf.committed for leaf in jax.tree.leaves(free))


@every_alias
@pytest.mark.parametrize(
    "tree",
    [
        {},
        (),
        None,
        {"a": None},
        {"a": np.zeros(0, np.float32)},
        {"a": np.zeros((0, 3), np.float32), "b": np.zeros((2, 0), np.float32)},
    ],
    ids=["dict", "tuple", "nothing", "none", "one empty", "two empty"],
)
def test_a_tree_without_entries_is_a_tree(name, tree):
    tx = aliases.make(name)
    state = first = tx.init(tree)
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(tree, state, tree)
        aliases.assert_equal(updates, tree)
        assert aliases.types(state) == aliases.types(first)


@pytest.mark.parametrize("name", ["sparse_mfac", "sparse_ggt"])
def test_bytes_that_lost_their_type_are_told_from_other_states(name):
    params = aliases.params()
    tx = getattr(efcp_jax, name)(0.1, window_size=3)
    state = jax.device_get(tx.init(params))
    bare = lambda x: x.view("V2") if x.dtype == jnp.bfloat16 else x
    with pytest.raises(ValueError, match=r"state.*view\(jnp.bfloat16\)"):
        tx.update(params, jax.tree.map(bare, state), params)
    half = jax.device_get(aliases.params("bfloat16"))
    for tree, call in ((half, tx.init), (half, lambda g: tx.update(g, state, params))):
        with pytest.raises(ValueError, match=r"view\(jnp.bfloat16\)"):
            call(jax.tree.map(bare, tree))


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_no_rank_or_dtype_is_promoted_silently(kind, error_feedback):
    """Of what every platform takes: all branches are traced."""
    params = {"b": (7,), "h": (32, 16), "k": (3, 10, 17), "w": (256, 128)}
    shapes = {
        name: jax.ShapeDtypeStruct(shape, "bfloat16" if name == "h" else "float32")
        for name, shape in params.items()
    }
    given = {"compressor": COMPRESSORS[kind], "error_feedback": error_feedback}
    metric = efcp_jax.diagonal_metric()
    made = [
        efcp_jax.scale_by_mfac(5, 0.1, **given),
        efcp_jax.scale_by_mfac(600, 0.1, relative=True, **given),
        efcp_jax.scale_by_mfac(5, b1=0.5, nesterov=True, metric=metric, **given),
        efcp_jax.scale_by_ggt(5, 0.1, block_diagonal=True, **given),
        efcp_jax.scale_by_ggt(5, b1=0.5, b2=0.9, metric=metric, **given),
        efcp_jax.error_feedback(COMPRESSORS[kind], error_dtype=jnp.int8),
        efcp_jax.monitor(efcp_jax.scale_by_mfac(5, 0.1, **given)),
    ]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for tx in made:
            state = jax.eval_shape(tx.init, shapes)
            updates, after = jax.eval_shape(tx.update, shapes, state, shapes)
            assert jax.tree.map(lambda x: x.dtype, updates) == {
                name: leaf.dtype for name, leaf in shapes.items()
            }
            assert aliases.types(after) == aliases.types(state)


@every_alias
def test_a_step_under_strict_promotion_is_the_step(name):
    tx, params = aliases.make(name), aliases.params()
    (gradient, *_) = aliases.gradients(params)
    expected = tx.update(gradient, tx.init(params), params)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = tx.update(gradient, tx.init(params), params)
    aliases.assert_equal(found, expected)

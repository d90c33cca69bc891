"""What Optax's users may expect of an optimizer: trees and wrappers."""

import re

import aliases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efcp_jax


every_alias = pytest.mark.parametrize("name", aliases.STRUCTURE)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def check_wrapped(wrapped, name, dtype, model=None, each=None, **extra):
    """Assert that `wrapped` makes the updates of the optimizer `name` by itself."""
    model = aliases.params(dtype) if model is None else model
    each = aliases.gradients(model) if each is None else each
    updates, state = aliases.run(wrapped, model, each, **extra)
    expected, _ = aliases.plain_run(name, dtype)
    # One rounding of the update apart, where XLA fuses the two programs differently.
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-8
    aliases.assert_close(updates, expected, tolerance)
    return state


@every_alias
@pytest.mark.parametrize(
    "tree",
    [
        jnp.float32(2.0),
        {},
        [],
        (),
        None,
        {"none": None, "vector": jnp.ones(3)},
        {"empty": jnp.zeros((0, 3)), "vector": jnp.ones(3)},
        jnp.zeros((0, 3)),
    ],
    ids=["scalar", "dict", "list", "tuple", "none", "none-leaf", "0x3-leaf", "0x3"],
)
def test_any_tree_has_updates_of_its_shapes_and_a_state_that_can_be_saved(name, tree):
    tx = aliases.make(name)
    state = tx.init(tree)
    # Orbax refuses arrays of size zero.
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))
    for _ in range(aliases.WINDOW + 1):
        updates, new_state = tx.update(tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        for update, leaf in zip(
            jax.tree.leaves(updates), jax.tree.leaves(tree), strict=True
        ):
            assert (update.shape, update.dtype) == (leaf.shape, leaf.dtype)
            assert jnp.all(jnp.isfinite(update))
        assert aliases.types(new_state) == aliases.types(state)
        state = new_state


@every_alias
def test_every_state_field_is_an_array_or_a_batch_for_each_group(name):
    params = aliases.params()
    (state, *_) = aliases.make(name).init(params)
    assert state._fields[0] == "count"
    assert state.count.dtype == jnp.int32
    parts = [state.error, state.basis, state.gram, *state.window[1:]]
    # A row is one array, or a named tuple of arrays; in parts, one of these for each.
    rows = state.window.rows
    parts += rows if isinstance(rows, tuple) else [rows]
    for part in parts:
        if isinstance(part, dict):
            each = [x if isinstance(x, tuple) else (x,) for x in part.values()]
            assert all(isinstance(array, jax.Array) for one in each for array in one)
            assert all(re.fullmatch(r"\d+(x\d+)?(-\d+)?", key) for key in part)
        else:
            assert part is None or isinstance(part, jax.Array)


@every_alias
def test_map_params_gives_a_tree_of_specs_with_the_structure_of_the_state(name):
    tx, params = aliases.make(name, momentum=0.5), aliases.params()
    state = tx.init(params)
    specs = {"bias": jax.P("x"), "kernel": jax.P(None, "x")}
    mapped = optax.tree.map_params(
        tx,
        lambda leaf, spec: spec,
        state,
        specs,
        # Fields that follow the parameters' shapes come whole.
        transform_non_params=lambda field: jax.tree.map(lambda _: jax.P(), field),
    )
    is_spec = lambda node: isinstance(node, jax.P)
    assert jax.tree.structure(mapped, is_leaf=is_spec) == jax.tree.structure(state)
    assert optax.tree.get(mapped, "trace") == specs


@every_alias
def test_state_fields_are_read_and_set_by_name(name):
    tx, params = aliases.make(name), aliases.params()
    state = tx.init(params)
    gram = optax.tree.get(state, "gram")
    assert gram.shape == (aliases.WINDOW, aliases.WINDOW)
    new = optax.tree.set(state, gram=gram + 1)
    np.testing.assert_array_equal(optax.tree.get(new, "gram"), gram + 1)


@every_alias
@every_dtype
def test_masked_equals_unmasked_and_passes_the_rest_through(name, dtype):
    wrapped = optax.masked(aliases.make(name), {"trained": True, "frozen": False})
    trained, frozen = aliases.params(dtype), [jnp.ones(2), {}, ()]
    each = aliases.gradients(trained)
    full = [{"trained": g, "frozen": frozen} for g in each]
    updates, _ = aliases.run(wrapped, full[0], full)
    expected, _ = aliases.plain_run(name, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-8
    aliases.assert_close(updates["trained"], expected, tolerance)
    np.testing.assert_array_equal(updates["frozen"][0], np.ones((aliases.STEPS, 2)))


@every_alias
@pytest.mark.parametrize("mask", [{}, [], ()], ids=["dict", "list", "tuple"])
def test_masks_of_empty_trees_do_nothing(name, mask):
    wrapped = optax.masked(aliases.make(name), mask)
    updates, _ = wrapped.update(mask, wrapped.init(mask), mask)
    assert updates == mask


@every_alias
@every_dtype
def test_partition_equals_the_optimizer_of_each_part(name, dtype):
    wrapped = optax.partition(
        {"ours": aliases.make(name), "sgd": optax.sgd(1.0)},
        {"trained": "ours", "other": "sgd"},
    )
    trained = aliases.params(dtype)
    each = [{"trained": g, "other": jnp.ones(2)} for g in aliases.gradients(trained)]
    updates, _ = aliases.run(wrapped, each[0], each, unexpected=jnp.ones(()))
    expected, _ = aliases.plain_run(name, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-8
    aliases.assert_close(updates["trained"], expected, tolerance)
    np.testing.assert_array_equal(updates["other"], -np.ones((aliases.STEPS, 2)))


@every_alias
@every_dtype
def test_multi_steps_equals_one_step_on_each_mean(name, dtype):
    params = aliases.params(dtype)
    each = aliases.gradients(params)
    twice = [g for gradient in each for g in (gradient, gradient)]
    wrapped = optax.MultiSteps(aliases.make(name), 2).gradient_transformation()
    updates, _ = aliases.run(wrapped, params, twice)
    between, final = (
        jax.tree.map(lambda leaf, start=start: leaf[start::2], updates)
        for start in (0, 1)
    )
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(between))
    expected, _ = aliases.plain_run(name, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-8
    aliases.assert_close(final, expected, tolerance)


def test_microbatching_outside_of_the_optimizer_equals_the_whole_batch():
    # The remedy for `MultiSteps`, which pays for a step on every part of a batch.
    loss = lambda params, batch: jnp.sum(jnp.square(batch @ params))
    params, batch = jnp.ones(3), jax.random.normal(jax.random.key(0), (8, 3))
    gradient = optax.microbatching.microbatch(
        jax.grad(loss),
        argnums=1,
        microbatch_size=2,
        accumulator=optax.microbatching.AccumulationType.SUM,
    )
    expected = jax.grad(loss)(params, batch)
    np.testing.assert_allclose(gradient(params, batch), expected, rtol=1e-5)


@every_alias
@every_dtype
def test_apply_if_finite_equals_unwrapped(name, dtype):
    check_wrapped(optax.apply_if_finite(aliases.make(name), 3), name, dtype)


@every_alias
@every_dtype
def test_inject_hyperparams_equals_unwrapped(name, dtype):
    factory = getattr(efcp_jax, name)
    static = tuple(aliases.STRUCTURE[name])
    wrapped = optax.inject_hyperparams(factory, static_args=static)(
        **aliases.hyperparameters(name), **aliases.STRUCTURE[name]
    )
    state = check_wrapped(wrapped, name, dtype)
    assert float(state.hyperparams["learning_rate"]) == aliases.LEARNING_RATE


@every_alias
def test_inject_hyperparams_needs_no_static_args_for_the_defaults(name):
    tx = optax.inject_hyperparams(getattr(efcp_jax, name))(learning_rate=0.125)
    params = aliases.params()
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    plain = getattr(efcp_jax, name)(0.125)
    expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
    aliases.assert_close(updates, expected)


@pytest.mark.parametrize("name", ["scale_by_mfac", "scale_by_ggt"])
def test_inject_hyperparams_passes_a_compressor_on_as_it_is(name):
    factory, compressor = getattr(efcp_jax, name), efcp_jax.top_k(0.25)
    wrapped = optax.inject_hyperparams(factory, static_args=("window_size",))(
        window_size=aliases.WINDOW, compressor=compressor
    )
    params = aliases.params()
    each = aliases.gradients(params)
    updates, state = aliases.run(wrapped, params, each)
    plain = factory(aliases.WINDOW, compressor=compressor)
    expected, inner = aliases.run(plain, params, each)
    aliases.assert_close(updates, expected)
    aliases.assert_close(state.inner_state, inner)
    assert set(state.hyperparams) <= {"damping", "eps", "b1", "b2"}


@every_alias
def test_a_traced_structural_argument_names_itself_and_the_remedy(name):
    factory = getattr(efcp_jax, name)
    wrapped = optax.inject_hyperparams(factory)(0.1, window_size=3)
    with pytest.raises(TypeError, match=r"`window_size`.*static_args"):
        wrapped.init(aliases.params())


@every_alias
def test_flatten_equals_the_optimizer_on_one_vector(name):
    tx, params = aliases.make(name), aliases.params()
    each = aliases.gradients(params)
    ravel = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
    updates, _ = aliases.run(optax.flatten(tx), params, each)
    expected, _ = aliases.run(tx, ravel(params), [ravel(g) for g in each])
    actual = jax.vmap(ravel)(updates)
    aliases.assert_close(actual, expected)


@every_alias
def test_learning_rates_and_ridges_accept_schedules(name):
    given = aliases.hyperparameters(name)
    schedules = {k: optax.constant_schedule(v) for k, v in given.items()}
    check_wrapped(aliases.make(name, **schedules), name, jnp.float32)


@every_alias
def test_a_schedule_is_announced_by_optax_own_annotation(name):
    # Optax's suites look at the annotation itself.
    annotations = getattr(efcp_jax, name).__annotations__
    for argument in (*aliases.hyperparameters(name), "momentum", "weight_decay"):
        kind = annotations[argument]
        assert kind == optax.ScalarOrSchedule or kind == optax.ScalarOrSchedule | None

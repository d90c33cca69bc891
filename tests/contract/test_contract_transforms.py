"""What JAX's users may expect of an optimizer: transformations and dtypes."""

import functools

import aliases
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efcp_jax


every_alias = pytest.mark.parametrize("name", aliases.ALL)


@functools.cache
def update(name):
    return jax.jit(aliases.make(name).update)


@every_alias
def test_a_shape_is_enough_for_init(name):
    tx, params = aliases.make(name), aliases.params()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = tx.init(params)
    aliases.assert_equal(tx.init(shapes), state)
    abstract = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    placed = jax.tree.map(lambda _: jax.P(), state)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        jitted = jax.jit(tx.init, out_shardings=placed)(params)
    aliases.assert_equal(jitted, state)
    # The first state is zeros, so it can be made anywhere from shapes alone.
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(state))


@every_alias
def test_a_fresh_state_can_be_donated(name):
    params = aliases.params()
    state = aliases.make(name).init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)  # no two fields share a buffer
    donating = jax.jit(aliases.make(name).update, donate_argnums=1)
    _, new_state = donating(params, state, params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    jax.block_until_ready(new_state)


@every_alias
def test_the_state_is_a_fixed_point_and_the_second_call_does_not_compile(name, capfd):
    params = aliases.params()
    tx = aliases.make(name)
    traces = []

    @jax.jit
    def step(gradient, state, params):
        traces.append(None)
        return tx.update(gradient, state, params, unexpected=jnp.ones(()))

    state = first = tx.init(params)
    for gradient in aliases.gradients(params):
        updates, state = step(gradient, state, params)
        assert aliases.types(state) == aliases.types(first)
    assert len(traces) == 1
    assert step._cache_size() == 1
    expected, _ = aliases.plain_run(name)  # a scan, with the state as its carry
    aliases.assert_close(updates, jax.tree.map(lambda leaf: leaf[-1], expected))
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


@every_alias
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_both_branches_of_a_cond_have_the_same_types(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        params = aliases.params(dtype)
        tx = aliases.make(name)

        @jax.jit
        def step(skip, gradient, state):
            return lax.cond(
                skip,
                lambda: (jax.tree.map(jnp.zeros_like, params), state),
                lambda: tx.update(gradient, state, params),
            )

        state = tx.init(params)
        updates, same = step(True, params, state)
        aliases.assert_equal(same, state)
        updates, new_state = step(False, params, state)
        assert aliases.types(updates) == aliases.types(params)
        assert aliases.types(new_state) == aliases.types(state)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


@every_alias
def test_a_step_in_float32_is_the_same_where_64_bits_are_on(name):
    """Of enough blocks for the kernels of TPUs, which are traced on any platform."""
    model = {"kernel": jnp.zeros((65, 260)), "half": jnp.zeros((9, 40), jnp.bfloat16)}
    each = aliases.gradients(model)
    narrow = aliases.run(aliases.make(name), model, each)
    with jax.enable_x64(True):
        wide = aliases.run(aliases.make(name), model, each)
    aliases.assert_close(wide, narrow)


@every_alias
@pytest.mark.parametrize("map_", [jax.vmap, jax.pmap], ids=["vmap", "pmap"])
def test_a_mapped_step_equals_the_steps_one_by_one(name, map_):
    tx, params = aliases.make(name), aliases.params()
    seeds = [aliases.gradients(params, 2, seed=seed) for seed in (0, 1)]

    def steps(gradients):
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
        return updates, state

    mapped = map_(steps)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds))
    for index, gradients in enumerate(seeds):
        state = tx.init(params)
        for gradient in gradients:
            updates, state = update(name)(gradient, state, params)
        one = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), mapped)
        aliases.assert_close(jax.device_get(one[0]), jax.device_get(updates))


@every_alias
@pytest.mark.parametrize(
    ("of_params", "of_gradients"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")],
)
def test_updates_have_the_dtype_of_the_gradients(name, of_params, of_gradients):
    # Weight decay, if any, promotes; the preconditioner itself does not.
    (params,) = aliases.gradients(aliases.params(of_params), 1)
    (gradient,) = aliases.gradients(params, 1, of_gradients)
    tx = aliases.make(name)
    state = tx.init(params)
    updates, new_state = tx.update(gradient, state, params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(updates)}
    assert dtypes == {jnp.dtype(of_gradients)}
    assert aliases.types(new_state) == aliases.types(state)


# A metric has one moment for both parts.
@pytest.mark.parametrize("name", aliases.STRUCTURE)
def test_a_complex_leaf_is_its_real_and_imaginary_parts_side_by_side(name):
    tx, complex_params = aliases.make(name), jnp.zeros((4, 4), jnp.complex64)
    each = aliases.gradients(complex_params)
    parts = lambda z: jnp.concatenate([z.real, z.imag], axis=-1)
    updates, _ = aliases.run(tx, complex_params, each)
    expected, _ = aliases.run(tx, jnp.zeros((4, 8)), [parts(g) for g in each])
    assert updates.dtype == jnp.complex64
    aliases.assert_close(parts(updates), expected)


@pytest.mark.parametrize("name", ["mfac", "ggt"])
def test_a_complex_leaf_equals_optax_split_of_real_and_imaginary(name):
    tx, params = aliases.make(name), jnp.zeros((4, 4), jnp.complex64)
    each = aliases.gradients(params)
    updates, _ = aliases.run(tx, params, each)
    split = optax.contrib.split_real_and_imaginary(tx)
    expected, _ = aliases.run(split, params, each)
    aliases.assert_close(updates, expected)


@every_alias
def test_an_integer_leaf_is_refused_by_name(name):
    with pytest.raises(ValueError, match="step"):
        aliases.make(name).init({"step": jnp.zeros((), jnp.int32)})


@every_alias
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_leaves_no_trace(name, bad):
    params = aliases.params()
    good, poisoned, after = aliases.gradients(params, 3)
    poisoned["bias"] = poisoned["bias"].at[1].set(bad)
    state = aliases.make(name).init(params)
    _, state = update(name)(good, state, params)
    updates, skipped = update(name)(poisoned, state, params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
    assert int(optax.tree.get(skipped, "skipped")) == 1
    actual, _ = update(name)(after, skipped, params)
    expected, _ = update(name)(after, state, params)
    aliases.assert_equal(actual, expected)


@every_alias
def test_a_first_gradient_of_zeros_gives_zeros(name):
    params = aliases.params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = update(name)(zeros, aliases.make(name).init(params), params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
    updates, _ = update(name)(params, state, params)
    leaves = jax.tree.leaves(updates)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in leaves)
    assert any(jnp.any(leaf) for leaf in leaves)


@pytest.mark.parametrize("scale_by", [efcp_jax.scale_by_mfac, efcp_jax.scale_by_ggt])
def test_the_scalers_point_up_the_gradient_and_take_no_arguments(scale_by):
    gradient = jnp.asarray([3.0, -4.0])
    tx = scale_by()
    updates, _ = tx.update(gradient, tx.init(gradient))
    assert np.dot(updates, gradient) > 0

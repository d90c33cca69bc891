"""Leaves in representations of their own against the vectors they stand for."""

import functools

import cases
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint as ocp
import pytest

import efcp_jax
from efcp_jax import by_label, identity, low_rank, top_k
from efcp_jax.compressors import ROW_AXIS, Compressor, scoped
from efcp_jax.devices.placement import layout
from efcp_jax.metrics import Gradient


M = cases.WINDOW
LABELS = {"bias": "rest", "gain": "rest", "kernel": "matrix", "weight": "table"}
DENSITY = 0.34  # two of the six entries of the weight


def mixed(labels=LABELS, **given):
    compressors = {
        "matrix": low_rank(2, **given),
        "table": top_k(DENSITY, **given),
        "rest": identity(**given),
    }
    return by_label(compressors, labels)


def make(method, **given):
    given = {"compressor": mixed(), **cases.METHODS[method], **given}
    return cases.transform(method.split("-")[0], window_size=M, **given)


def ravel(tree, names=cases.SHAPES):
    return oracles.flat([tree[name] for name in sorted(names)])


@functools.cache
def rows():
    """Return the oracle's rows; of the low rank part those of that leaf alone."""
    stacked = cases.gradients(cases.STEPS)
    alone = efcp_jax.error_feedback(low_rank(2))
    kernels, _ = cases.run(alone, stacked["kernel"], cases.params()["kernel"])
    weights, _ = oracles.with_feedback(
        lambda v: oracles.top_k(v, DENSITY), list(stacked["weight"].reshape(-1, 6))
    )
    return [
        ravel(
            {
                "bias": stacked["bias"][t],
                "gain": stacked["gain"][t],
                "kernel": kernels[t],
                "weight": np.asarray(weights[t]).reshape(2, 3),
            }
        )
        for t in range(cases.STEPS)
    ]


@functools.cache
def run(method):
    return cases.run(make(method), cases.gradients(cases.STEPS), cases.params())


@pytest.mark.parametrize("method", cases.METHODS)
def test_updates_are_those_of_the_full_matrix_over_all_parts(method):
    updates, _ = run(method)
    for t in range(cases.STEPS):
        expected = cases.oracle(method, rows()[: t + 1], **cases.METHODS[method])
        update = ravel(cases.at(updates, t))
        assert oracles.relative_error(update, expected) <= 1e-5


def test_the_gram_matrix_is_the_sum_of_those_of_the_parts():
    _, states = run("mfac")
    state = cases.at(states, cases.STEPS - 1)
    scale = np.asarray(state.window.scale, np.float64)
    gram = scale[:, None] * np.asarray(state.gram, np.float64) * scale
    order = [(int(state.window.slot) - 1 - age) % M for age in range(M)]
    newest = np.array(rows()[::-1][:M])
    ends = np.cumsum([np.prod(cases.SHAPES[n]) for n in sorted(cases.SHAPES)])
    parts = np.split(newest, ends[:-1].astype(int), axis=1)
    expected = sum(part @ part.T for part in parts)
    np.testing.assert_allclose(gram[np.ix_(order, order)], expected, rtol=1e-5)


def test_what_one_part_drops_is_its_own_error():
    tx = efcp_jax.error_feedback(mixed())
    stacked = cases.gradients(cases.STEPS)
    updates, states = cases.run(tx, stacked, cases.params())
    for t in range(cases.STEPS):
        emitted = ravel(cases.at(updates, t))
        np.testing.assert_allclose(emitted, rows()[t], rtol=0, atol=1e-5)
    assert not np.any(states.error["rest"])
    dropped = np.sum(stacked["weight"], 0) - np.sum(updates["weight"], 0)
    error = np.asarray(states.error["table"][-1])
    np.testing.assert_allclose(error.reshape(2, 3), dropped, atol=1e-5)


@pytest.mark.parametrize("method", cases.METHODS)
def test_parts_that_keep_everything_are_the_identity(method):
    parts = {"matrix": low_rank(100), "table": top_k(1.0), "rest": identity()}
    stacked = cases.gradients(cases.STEPS)
    whole = make(method, compressor=identity())
    divided = make(method, compressor=by_label(parts, LABELS))
    expected, _ = cases.run(whole, stacked, cases.params())
    updates, states = cases.run(divided, stacked, cases.params())
    for each in zip(cases.vectors(updates), cases.vectors(expected), strict=True):
        assert oracles.relative_error(*each) <= 1e-5
    assert not any(np.any(error) for error in jax.tree.leaves(states.error))


def test_one_label_for_all_is_the_compressor_itself():
    stacked = cases.gradients(cases.STEPS)
    plain = make("mfac", compressor=top_k(0.25, block_size=16))
    labelled = by_label({"all": top_k(0.25, block_size=16)}, "all")
    expected, old = cases.run(plain, stacked, cases.params())
    updates, new = cases.run(make("mfac", compressor=labelled), stacked, cases.params())
    for a, b in zip(cases.vectors(updates), cases.vectors(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(new.gram, old.gram)
    np.testing.assert_array_equal(new.window.scale, old.window.scale)


def test_inner_is_the_transpose_of_combine_and_rows_are_what_they_stand_for():
    space = mixed().bind(layout(cases.params(), jnp.float32, None))
    stacked = cases.gradients(M + 1)
    # Parts of very different magnitude, so that each has another ratio.
    sizes = {"bias": 1.0, "gain": 1e-3, "kernel": 1e3, "weight": 1e-6}
    stacked = {name: sizes[name] * leaf for name, leaf in stacked.items()}
    zero, _, basis = space.zeros()
    made, dense = [], []
    for t in range(M + 1):
        vector = space.pack(cases.at(stacked, t))
        before = basis
        row, scale, basis = space.compress(vector, before, True)
        made.append(row)
        dense.append(ravel(space.unpack(space.expand(row))))
        gradient = Gradient(cases.at(stacked, t), None)
        given = gradient, zero, before, jnp.bool_(True), jnp.int32(t), True
        *_, rest, _ = space.feed(*given)
        difference = ravel(cases.at(stacked, t)) - float(scale) * dense[-1]
        rest = ravel(space.unpack(rest))
        np.testing.assert_allclose(rest, difference, rtol=1e-4, atol=2e-4)
    window = jax.tree.map(lambda *x: jnp.concatenate(x, axis=ROW_AXIS), *made[:M])
    products = space.inner(window, made[M])
    np.testing.assert_allclose(products, np.array(dense[:M]) @ dense[M], rtol=1e-5)
    columns = lax.map(lambda w: space.combine(window, w), jnp.eye(M))
    for i in range(M):
        combined = ravel(space.unpack(cases.at(columns, i)))
        np.testing.assert_allclose(combined, dense[i], rtol=1e-5)
        updated = ravel(space.update(window, jnp.eye(M)[i]))
        np.testing.assert_allclose(updated, dense[i], rtol=1e-5)


def test_a_small_part_beside_a_large_one_keeps_the_digits_of_its_dtype():
    half = {"value_dtype": jnp.float16}
    compressor = by_label(
        {"a": identity(**half), "b": top_k(1.0, **half)}, {"large": "a", "small": "b"}
    )
    rng = np.random.default_rng(0)
    gradient = {
        "large": jnp.asarray(rng.normal(size=9), jnp.float32),
        "small": jnp.asarray(1e-9 * rng.normal(size=9), jnp.float32),
    }
    tx = efcp_jax.error_feedback(compressor)
    update, _ = jax.jit(tx.update)(gradient, tx.init(gradient))
    for name in gradient:
        np.testing.assert_allclose(update[name], gradient[name], rtol=2**-10)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
def test_every_dtype_and_a_state_that_is_a_fixed_point(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = cases.params(dtype)
        tx = make("ggt")
        stacked = cases.gradients(3, "float32")
        stacked = jax.tree.map(lambda x: x.astype(dtype), stacked)
        state = tx.init(params)
        types = lambda tree: [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
        first, update = types(state), jax.jit(tx.update)
        for t in range(3):
            updates, state = update(cases.at(stacked, t), state, params)
            assert types(updates) == types(params)
        assert types(state) == first
        assert update._cache_size() == 1
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mfac", "ggt"])
def test_vmap_gives_each_of_several_runs(method):
    tx, runs = make(method), [cases.gradients(4, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    together, _ = jax.jit(jax.vmap(lambda g: cases.scan(tx, g, cases.params())))(
        stacked
    )
    for i, each in enumerate(runs):
        alone, _ = cases.run(tx, each, cases.params())
        for a, b in zip(
            cases.vectors(cases.at(together, i)), cases.vectors(alone), strict=True
        ):
            assert oracles.relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("leaf", ["bias", "kernel", "weight"])
def test_a_gradient_that_is_not_finite_in_one_part_is_skipped_by_all(leaf):
    stacked = cases.gradients(6)
    at = (3,) + (0,) * (stacked[leaf].ndim - 1)
    faulty = {**stacked, leaf: stacked[leaf].at[at].set(jnp.nan)}
    without = jax.tree.map(lambda x: jnp.delete(x, 3, axis=0), stacked)
    for tx in (make("mfac"), efcp_jax.error_feedback(mixed())):
        updates, states = cases.run(tx, faulty, cases.params())
        expected, kept = cases.run(tx, without, cases.params())
        assert states.skipped[-1] == 1
        assert not np.any(ravel(cases.at(updates, 3)))
        last = ravel(cases.at(expected, 4))
        assert oracles.relative_error(ravel(cases.at(updates, 5)), last) <= 1e-5
        errors = zip(
            jax.tree.leaves(states.error), jax.tree.leaves(kept.error), strict=True
        )
        for a, b in errors:
            np.testing.assert_allclose(a[-1], b[-1], rtol=1e-5, atol=1e-6)


def test_a_function_a_prefix_and_a_masked_tree_label_alike():
    params = {"block": {"w": jnp.ones((6, 5)), "b": jnp.ones(5)}, "table": jnp.ones(9)}
    full = {"block": {"w": "matrix", "b": "rest"}, "table": "table"}

    def function(tree):
        kind = lambda leaf: "matrix" if leaf.ndim == 2 else "rest"
        return {"block": jax.tree.map(kind, tree["block"]), "table": "table"}

    states = [
        jax.eval_shape(efcp_jax.scale_by_mfac(2, compressor=mixed(labels)).init, params)
        for labels in (full, function)
    ]
    assert states[0] == states[1]
    assert set(states[0].error) == {"matrix", "table", "rest"}
    parts = {"table": top_k(0.5), "rest": identity()}
    prefix = by_label(parts, {"block": "rest", "table": "table"})
    state = efcp_jax.scale_by_mfac(2, compressor=prefix).init(params)
    assert state.error["rest"].size == 35
    masked = optax.masked(
        efcp_jax.scale_by_mfac(
            2,
            compressor=by_label(
                {"m": low_rank(2)}, {"block": {"w": "m", "b": "m"}, "table": "m"}
            ),
        ),
        {"block": True, "table": False},
    )
    gradient, state = params, masked.init(params)
    updates, state = jax.jit(masked.update)(gradient, state, params)
    np.testing.assert_array_equal(updates["table"], gradient["table"])
    assert list(state.inner_state.error["m"]) == ["5", "6x5"]


@pytest.mark.slow
def test_map_params_an_empty_tree_and_a_checkpoint(tmp_path):
    empty = make("mfac")
    assert empty.update({}, empty.init({}))[0] == {}
    tx, stacked = make("mfac"), cases.gradients(cases.STEPS)
    _, states = run("mfac")
    state = cases.at(jax.tree.map(jnp.asarray, states), M)
    tx.init(cases.params())  # whose structure `map_params` is answered with
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(tx.init, cases.params()),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", abstract)
    update = jax.jit(tx.update)
    results = [update(cases.at(stacked, M + 1), each) for each in (state, restored)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_memory_and_diagnostics_are_those_of_the_sum():
    tx = make("mfac", error_dtype=jnp.bfloat16)
    report = efcp_jax.memory_report(tx, cases.params())
    state = tx.init(cases.params())
    assert report.total == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Two columns of 6 + 5 and their ratio, two values and offsets, eight entries, and
    # three ratios.
    row = 4 * 2 * (6 + 5) + 4 + 2 * (4 + 1) + 4 * 8
    assert report.fields["window.rows.parts"] == M * row
    assert report.fields["window.rows.ratios"] == M * 4 * 3
    assert report.fields["error"] == 2 * cases.SIZE
    _, states = run("mfac")
    figures = efcp_jax.diagnostics(cases.at(states, cases.STEPS - 1))
    newest = np.linalg.norm(rows()[-1])
    assert float(figures["row_norm"]) == pytest.approx(newest, rel=1e-5)
    assert figures["spectrum"].shape == (M,)
    window = np.array(rows()[-M:])
    expected = np.linalg.eigvalsh(window @ window.T)
    np.testing.assert_allclose(figures["spectrum"], expected, rtol=1e-4)


def test_it_is_immutable_configuration():
    compressor = mixed()
    assert isinstance(compressor, Compressor)
    assert hash(compressor) == hash(mixed())
    assert compressor == mixed()
    assert not compressor.lossless
    assert by_label({"a": identity()}, "a").lossless
    with pytest.raises(AttributeError):
        compressor.labels = ()


FEW = {"a": identity(), "b": top_k(0.5)}


@pytest.mark.parametrize(
    ("compressors", "labels", "kind", "text"),
    [
        ([identity()], "a", TypeError, "must be a dictionary.*top_k"),
        ({}, "a", ValueError, "at least one label"),
        ({"a": "top_k"}, "a", TypeError, r"compressors\['a'\].*'top_k'"),
        ({1: identity()}, "a", TypeError, "must be strings, got 1 of type int"),
        ({"a": mixed()}, "a", TypeError, r"compressors\['a'\].*more labels"),
        (
            {"a": scoped(low_rank(2), True)},
            "a",
            ValueError,
            "each leaf.*optax.partition",
        ),
        (FEW, {"x": "c"}, ValueError, r"'a', 'b', got 'c' at labels\['x'\]"),
        (FEW, {"x": 3}, TypeError, r"got 3 of type int at labels\['x'\]"),
    ],
)
def test_bad_arguments_are_refused(compressors, labels, kind, text):
    with pytest.raises(kind, match=text):
        by_label(compressors, labels)


@pytest.mark.parametrize(
    ("labels", "kind", "text"),
    [
        ({"x": "a"}, ValueError, r"no entry for params\['y'\] of shape \(3,\)"),
        ({"x": "a", "y": None}, ValueError, r"no entry for params\['y'\]"),
        ({"x": "a", "y": "a"}, ValueError, "no parameter to the compressor 'b'"),
        (lambda p: {"x": "a", "y": "z"}, ValueError, r"got 'z' at labels\['y'\]"),
        (lambda p: {"x": "a", "y": 1}, TypeError, r"got 1 of type int"),
        (lambda p: {"x": "a"}, ValueError, r"no entry for params\['y'\]"),
    ],
)
def test_labels_that_do_not_fit_the_parameters_are_refused(labels, kind, text):
    tx = efcp_jax.scale_by_mfac(2, compressor=by_label(FEW, labels))
    with pytest.raises(kind, match=text):
        tx.init({"x": jnp.ones(2), "y": jnp.ones(3)})


def test_a_state_of_other_labels_is_refused():
    params = {"x": jnp.ones(2), "y": jnp.ones(3)}
    state = make("mfac", compressor=by_label(FEW, {"x": "a", "y": "b"})).init(params)
    tx = make("mfac", compressor=by_label(FEW, {"x": "b", "y": "a"}))
    with pytest.raises(ValueError, match="state does not fit"):
        tx.update(params, state, params)

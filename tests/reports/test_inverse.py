"""Products with the inverse Fisher matrix against d x d matrices."""

import functools

import cases
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import oracles
import pytest
import sharding_cases

import efcp_jax
from efcp_jax import by_label, identity, inverse_fisher_product, low_rank, top_k


M = cases.WINDOW
NAMES = [*cases.REPRESENTATIONS, "identity-bf16", "top_k-words-bf16", "low_rank-bf16"]


def ravel(tree):
    return oracles.flat(jax.tree.leaves(tree))


def tree_like(model, seed=7):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model)


def expected(rows, damping, divisor, x):
    """Solve with the d x d matrix."""
    rows = np.array(rows, np.float64)
    fisher = damping * np.eye(rows.shape[1]) + rows.T @ rows / divisor
    return np.linalg.solve(fisher, x)


@functools.partial(jax.jit, static_argnames=("name", "divisor"))
def product(tree, state, damping, name, divisor="window_size"):
    compressor = cases.COMPRESSORS[name]
    return inverse_fisher_product(
        tree, state, damping, compressor=compressor, divisor=divisor
    )


@pytest.mark.parametrize("divisor", ["window_size", "filled"])
@pytest.mark.parametrize("name", NAMES)
def test_products_equal_the_textbook(name, divisor):
    run = cases.compressed_run("mfac", name)
    tree = tree_like(cases.params())
    for count in (1, 3, M, 2 * M + 1):
        state = jax.tree.map(jnp.asarray, cases.at(run.states, count - 1))
        rows = run.rows[max(0, count - M) : count]
        for damping in (1e-2, 1.0):
            result = ravel(product(tree, state, damping, name, divisor))
            n = M if divisor == "window_size" else min(count, M)
            for part in cases.parts(name):
                solved = expected(
                    [row[part] for row in rows], damping, n, ravel(tree)[part]
                )
                error = oracles.relative_error(result[part], solved)
                assert error <= (2e-3 if "bf16" in name and "low" in name else 1e-4)


def test_an_empty_window_divides_by_the_damping():
    tree, state = (
        tree_like(cases.params()),
        efcp_jax.scale_by_mfac(M).init(cases.params()),
    )
    result = ravel(product(tree, state, 0.25, "identity"))
    np.testing.assert_allclose(result, 4 * ravel(tree), rtol=1e-6)


def trained(rows):
    """Return the state behind `rows`, and the rows as they are stored."""
    tx = efcp_jax.scale_by_mfac(len(rows))
    state, update = tx.init(jnp.zeros(rows.shape[1])), jax.jit(tx.update)
    for row in rows:
        _, state = update(jnp.asarray(row, jnp.float32), state)
    return state, rows.astype(np.float32).astype(np.float64)


FAMILIES = {
    "normal": lambda base: base,
    "graded": lambda base: base * np.logspace(0, -6, len(base))[:, None],
    "nearly dependent": lambda base: base[:1] + 1e-3 * base,
    "small": lambda base: 1e-15 * base,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_residual_is_as_small_as_promised(name):
    rng = np.random.default_rng(0)
    state, rows = trained(FAMILIES[name](rng.normal(size=(16, 400))))
    square = np.linalg.norm(rows, 2) ** 2 / len(rows)
    for condition in (1e1, 1e3, 2e3, 1e5, 3e5):
        damping = np.float32(square / condition)
        matrix = rows.T @ rows / len(rows) + float(damping) * np.eye(rows.shape[1])
        trees = [rows.T @ rng.normal(size=len(rows)), rows[0], rows[-1]]
        for x in [*trees, rng.normal(size=rows.shape[1])]:
            x = (x / np.abs(x).max()).astype(np.float32)
            y = np.asarray(
                product(jnp.asarray(x), state, damping, "identity"), np.float64
            )
            length = np.linalg.norm(x)
            residual = np.linalg.norm(x - matrix @ y) / length
            floor = square * np.linalg.norm(y) / length
            assert residual < 1e-7 * floor + 2e-5
            if floor < 2e3:
                assert residual < 1e-4
            if condition <= 2e3:  # for any tree
                assert residual < 1e-4


def test_the_formula_alone_would_lose_what_refinement_keeps(monkeypatch):
    rng = np.random.default_rng(0)
    state, rows = trained(rng.normal(size=(16, 400)))
    damping = np.float32(np.linalg.norm(rows, 2) ** 2 / len(rows) / 1e5)
    matrix = rows.T @ rows / len(rows) + float(damping) * np.eye(rows.shape[1])
    x = rows[-1].astype(np.float32)
    residuals = []
    for products, solutions in [(1, 1), (3, 2)]:
        monkeypatch.setattr("efcp_jax.reports.inverse._PRODUCTS", products)
        monkeypatch.setattr("efcp_jax.reports.inverse._SOLUTIONS", solutions)
        y = inverse_fisher_product(
            jnp.asarray(x), state, damping, compressor=identity()
        )
        rest = x - matrix @ np.asarray(y, np.float64)
        residuals.append(np.linalg.norm(rest) / np.linalg.norm(x))
    assert residuals[0] > 1e-2
    assert residuals[1] < 1e-5


def test_a_newest_row_gives_the_update_of_the_step():
    tx = efcp_jax.scale_by_mfac(M, 0.1)
    stacked = cases.gradients(M + 2)
    updates, states = cases.run(tx, stacked, cases.params())
    state = cases.at(states, M + 1)
    result = product(cases.at(stacked, M + 1), state, 0.1, "identity")
    update = ravel(cases.at(updates, M + 1))
    assert oracles.relative_error(ravel(result), update) <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "complex64"])
def test_every_dtype_of_parameters(dtype):
    with jax.enable_x64(dtype == "float64"):
        model = cases.params(dtype)
        rows = [tree_like(model, seed) for seed in range(2)]
        if dtype == "complex64":
            rows = [jax.tree.map(lambda x: x * (1 + 2j), row) for row in rows]
        tx = efcp_jax.scale_by_mfac(2)
        state = tx.init(model)
        for row in rows:
            _, state = jax.jit(tx.update)(row, state, model)
        tree = tree_like(model, 9)
        result = product(tree, state, 0.5, "identity")
        dtypes = lambda t: [leaf.dtype for leaf in jax.tree.leaves(t)]
        assert dtypes(result) == dtypes(model)
        solved = expected([ravel(row) for row in rows], 0.5, 2, ravel(tree))
        tolerance = {"bfloat16": 2**-8, "float64": 1e-13}.get(dtype, 1e-5)
        assert oracles.relative_error(ravel(result), solved) <= tolerance


def test_several_trees_at_once_and_a_wrapped_state():
    compressor = top_k(0.25, block_size=16)
    tx = optax.chain(
        optax.clip(10.0),
        efcp_jax.monitor(efcp_jax.scale_by_mfac(M, compressor=compressor)),
    )
    model, stacked = cases.params(), cases.gradients(M)
    _, states = cases.run(tx, stacked, model)
    state = cases.at(states, M - 1)
    solve = jax.jit(
        lambda x, s: inverse_fisher_product(x, s, 0.1, compressor=compressor)
    )
    together = jax.vmap(solve, (0, None))(stacked, state)
    for t in range(M):
        alone = ravel(solve(cases.at(stacked, t), state))
        assert oracles.relative_error(ravel(cases.at(together, t)), alone) <= 1e-5


def test_what_is_not_a_number_stays_visible():
    run = cases.compressed_run("mfac", "identity")
    state = jax.tree.map(jnp.asarray, cases.at(run.states, M))
    tree = tree_like(cases.params())
    tree["bias"] = tree["bias"].at[0].set(jnp.nan)
    assert np.isnan(ravel(product(tree, state, 0.1, "identity"))).any()


LABELLED = by_label(
    {"a": top_k(1.0, block_size=4), "b": low_rank(2), "c": identity()},
    {"b": "c", "k": "a", "w": "b"},
)


@pytest.mark.parametrize(
    ("placing", "kind"),
    [
        ("data", AxisType.Auto),
        ("fsdp x tensor", AxisType.Explicit),
        ("mixed", AxisType.Auto),
    ],
)
@pytest.mark.parametrize("compressor", [identity(), LABELLED], ids=["one", "parts"])
def test_many_devices_give_the_product_of_one(compressor, placing, kind):
    where = sharding_cases.PLACINGS[placing]
    mesh = where.make_mesh(kind)
    shardings = where.shardings(mesh)
    given = None if kind == AxisType.Explicit else shardings
    stacked = sharding_cases.gradients()
    tree = tree_like(sharding_cases.params())

    def solve(tree, params, stacked, sharding=None):
        tx = efcp_jax.scale_by_mfac(
            sharding_cases.WINDOW, 0.1, compressor=compressor, sharding=sharding
        )
        _, state = sharding_cases.train(tx, params, stacked)
        return inverse_fisher_product(
            tree, (state,), 0.1, compressor=compressor, sharding=sharding
        )

    expected = jax.jit(solve)(tree, sharding_cases.params(), stacked)
    stack = {n: NamedSharding(mesh, P(None, *s)) for n, s in where.specs.items()}
    with jax.set_mesh(mesh):
        result = jax.jit(functools.partial(solve, sharding=given))(
            jax.device_put(tree, shardings),
            jax.device_put(sharding_cases.params(), shardings),
            jax.device_put(stacked, stack),
        )
    assert oracles.relative_error(ravel(result), ravel(expected)) <= 2e-5


def call(tree=None, state=None, damping=0.1, **given):
    model = {"x": jnp.ones(3)}
    state = efcp_jax.scale_by_mfac(2).init(model) if state is None else state
    given = {"compressor": identity(), **given}
    return inverse_fisher_product(
        model if tree is None else tree, state, damping, **given
    )


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"damping": 0.0}, ValueError, r"`damping` must be in \(0, inf\)"),
        ({"damping": lambda t: 0.1}, TypeError, "`damping` must be a number"),
        ({"compressor": "identity"}, TypeError, "`compressor` must be.*'identity'"),
        ({"compressor": top_k(0.5)}, ValueError, "state does not fit"),
        ({"divisor": "m"}, ValueError, "`divisor` must be"),
        ({"tree": {"x": jnp.ones(4)}}, ValueError, "state does not fit"),
        ({"tree": {"x": jnp.ones(3, int)}}, ValueError, r"`tree` must be.*tree\['x'\]"),
        ({"state": optax.EmptyState()}, ValueError, "exactly one state.*got 0"),
    ],
)
def test_bad_arguments_are_refused(given, kind, text):
    with pytest.raises(kind, match=text):
        call(**given)


def test_two_states_and_that_of_ggt_are_refused():
    model = {"x": jnp.ones(3)}
    states = (
        efcp_jax.scale_by_mfac(2).init(model),
        efcp_jax.scale_by_mfac(2).init(model),
    )
    with pytest.raises(ValueError, match="got 2"):
        call(state=states)
    with pytest.raises(ValueError, match="got 0"):
        call(state=efcp_jax.scale_by_ggt(2).init(model))


def test_a_window_in_a_metric_is_refused():
    tx = efcp_jax.scale_by_mfac(2, metric=efcp_jax.diagonal_metric())
    params = jnp.zeros(3)
    with pytest.raises(ValueError, match="metric"):
        efcp_jax.inverse_fisher_product(
            params, tx.init(params), 1.0, compressor=efcp_jax.identity()
        )

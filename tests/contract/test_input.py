"""Wrong input is refused where the user stands, in words that tell what to pass."""

import ast
import inspect
import math
from pathlib import Path
import tomllib

import aliases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efcp_jax


pytestmark = pytest.mark.whole

PACKAGE = Path(efcp_jax.__file__).parent
X = jnp.zeros(3)
NAN = math.nan

SCALES = {
    "scale_by_mfac": (efcp_jax.scale_by_mfac, {}),
    "scale_by_ggt": (efcp_jax.scale_by_ggt, {}),
}
ALIASES = {
    name: (getattr(efcp_jax, name), {"learning_rate": 0.1})
    for name in aliases.STRUCTURE
}
MFAC = ("scale_by_mfac", "mfac", "sparse_mfac", "low_rank_mfac")
GGT = ("scale_by_ggt", "ggt", "sparse_ggt", "low_rank_ggt")
DTYPED = ("identity", "top_k", "low_rank", *ALIASES)
SKIPPING = ("error_feedback", *SCALES, *ALIASES)
FUNCTIONS = {
    "identity": (efcp_jax.identity, {}),
    "top_k": (efcp_jax.top_k, {}),
    "low_rank": (efcp_jax.low_rank, {}),
    "error_feedback": (efcp_jax.error_feedback, {}),
    **SCALES,
    **ALIASES,
}

# Argument, functions that take it, values that must be refused.
REFUSED = [
    ("window_size", (*SCALES, *ALIASES), [0, -1, 1.5, "8", True, X]),
    ("density", ("top_k", "sparse_mfac", "sparse_ggt"), [0, -0.1, 1.1, NAN, "1", X]),
    ("block_size", ("top_k", "sparse_mfac", "sparse_ggt"), [0, -4, 2.0, "4", X]),
    ("rank", ("low_rank", "low_rank_mfac", "low_rank_ggt"), [0, -1, 1.5, "2", X]),
    ("block_diagonal", (*SCALES, *ALIASES), [1, "yes", X]),
    ("value_dtype", DTYPED, ["nonsense", jnp.int32, jnp.complex64]),
    ("error_dtype", SKIPPING, ["nonsense", jnp.int16, jnp.complex64]),
    ("skip_nonfinite", SKIPPING, [1, "no", None, X]),
    ("error_feedback", (*SCALES, *ALIASES), [1, "no", None, X]),
    ("compressor", ("error_feedback", *SCALES), ["top_k", 0.1, efcp_jax.top_k, X]),
    ("damping", MFAC, [0.0, -1e-3, NAN, math.inf, "1", 1j, X, np.complex64(1)]),
    ("divisor", MFAC, ["m", None, 3, X]),
    ("eps", GGT, [-1e-3, NAN, math.inf, "1", 1j, X]),
    ("b1", (*GGT, *MFAC), [-0.1, 1.0, NAN, "1", X]),
    ("b2", GGT, [0.0, 1.1, NAN, "1", X]),
    ("nesterov", (*SCALES, *ALIASES), [1, "no", None, X]),
    ("relative", (*SCALES, *ALIASES), [1, "no", None, X]),
    ("metric", SKIPPING, [True, 0.95, "adam", efcp_jax.diagonal_metric]),
    ("learning_rate", ALIASES, [NAN, math.inf, "1", None, X]),
    ("momentum", ALIASES, [-0.1, 1.0, NAN, "1", X]),
    ("weight_decay", ALIASES, [-0.1, NAN, "1", None, X]),
]


@pytest.mark.parametrize(
    ("function", "argument", "value"),
    [(f, name, v) for name, given, vs in REFUSED for f in given for v in vs],
)
def test_a_wrong_argument_is_refused_by_its_name(function, argument, value):
    make, required = FUNCTIONS[function]
    with pytest.raises((TypeError, ValueError), match=f"`{argument}`"):
        make(**{**required, argument: value})


def test_every_argument_of_every_factory_is_in_the_table():
    table = {(name, f) for name, functions, _ in REFUSED for f in functions}
    # Checked by `init`, which knows the tree they belong to.
    later = {"sharding", "mask"}
    for function, (make, _) in FUNCTIONS.items():
        for name in inspect.signature(make).parameters:
            assert name in later or (name, function) in table, (function, name)


@pytest.mark.parametrize("make", [f for f, _ in SCALES.values()])
def test_a_wrong_sharding_is_refused_by_init(make):
    with pytest.raises((TypeError, ValueError), match="`sharding`"):
        make(sharding="x").init({"w": jnp.zeros((2, 2))})


@pytest.mark.parametrize("leaf", [jnp.zeros(2, jnp.int32), np.array([True])])
def test_parameters_that_are_not_floating_are_named(leaf):
    params = {"layer": [jnp.zeros(2), leaf]}
    for make, required in [*SCALES.values(), *ALIASES.values()]:
        with pytest.raises(ValueError, match=r"params\['layer'\]\[1\]"):
            make(**required).init(params)


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(TypeError, match=r"params\['w'\]"):
        efcp_jax.scale_by_mfac().init({"w": "weights"})


PARAMS = {"b": jnp.zeros(2), "w": jnp.zeros((3, 4))}
COMPRESSORS = {
    "dense": efcp_jax.identity(),
    "sparse": efcp_jax.top_k(0.5),
    "low_rank": efcp_jax.low_rank(1),
}
WRONG = {
    r"params\['b'\]": {"w": jnp.zeros((3, 4))},
    r"updates\['c'\]": {**PARAMS, "c": jnp.zeros(1)},
    r"updates\['w'\] has shape \(4, 3\)": {**PARAMS, "w": jnp.zeros((4, 3))},
    r"updates\['w'\] has dtype complex": {**PARAMS, "w": jnp.zeros((3, 4), complex)},
    r"int32 at updates\['b'\]": {**PARAMS, "b": jnp.zeros(2, jnp.int32)},
}


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=list(COMPRESSORS))
@pytest.mark.parametrize("path", WRONG)
def test_a_gradient_that_does_not_fit_its_parameter_is_named(path, compressor):
    for tx in (
        efcp_jax.scale_by_mfac(2, compressor=compressor),
        efcp_jax.error_feedback(compressor),
    ):
        with pytest.raises(ValueError, match=path):
            tx.update(WRONG[path], tx.init(PARAMS), PARAMS)


def test_containers_of_another_kind_are_refused():
    tx = efcp_jax.scale_by_mfac(2)
    params = (jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="containers of `updates`"):
        tx.update(list(params), tx.init(params), params)


def test_without_parameters_a_low_rank_state_names_the_shape():
    tx = efcp_jax.scale_by_mfac(2, compressor=efcp_jax.low_rank(1))
    state = tx.init(PARAMS)
    for wrong, path in [
        ({**PARAMS, "w": jnp.zeros((4, 3))}, r"state\.error\['4x3'\]"),
        ({"w": jnp.zeros((3, 4))}, r"surplus.*state\.error\['2'\]"),
        ({**PARAMS, "c": jnp.zeros(3)}, r"lacks state\.error\['3'\]"),
        ({**PARAMS, "c": jnp.zeros(2)}, r"state\.error\['2'\].*\(2, 2\)"),
    ]:
        with pytest.raises(ValueError, match=path):
            tx.update(wrong, state)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_without_parameters_a_packed_state_knows_their_number(name):
    tx = efcp_jax.scale_by_mfac(2, compressor=COMPRESSORS[name])
    wrong = {**PARAMS, "w": jnp.zeros((3, 5))}
    with pytest.raises(ValueError, match=r"does not fit.*updates\['w'\] \(3, 5\)"):
        tx.update(wrong, tx.init(PARAMS))


def test_the_state_of_another_transformation_is_refused():
    state = efcp_jax.scale_by_mfac(2).init(PARAMS)
    with pytest.raises(ValueError, match=r"state\.window\.rows.*shape"):
        efcp_jax.scale_by_mfac(3).update(PARAMS, state)
    narrow = efcp_jax.identity(value_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"state\.window\.rows.*float32.*bfloat16"):
        efcp_jax.scale_by_mfac(2, compressor=narrow, error_feedback=False).update(
            PARAMS, state
        )


def test_a_gradient_of_another_floating_dtype_is_taken():
    tx = efcp_jax.scale_by_mfac(2)
    half = jax.tree.map(lambda leaf: jnp.ones_like(leaf, jnp.bfloat16), PARAMS)
    updates, state = tx.update(half, tx.init(PARAMS), PARAMS)
    assert updates["w"].dtype == jnp.bfloat16
    assert state.gram.dtype == jnp.float32


def test_the_tools_refuse_what_they_cannot_read():
    with pytest.raises(ValueError, match="`state`"):
        efcp_jax.diagnostics(optax.adam(0.1).init(PARAMS))
    tx = optax.chain(efcp_jax.scale_by_mfac(2), efcp_jax.scale_by_ggt(2))
    with pytest.raises(ValueError, match="`state`"):
        efcp_jax.diagnostics(tx.init(PARAMS))
    with pytest.raises(TypeError, match="`tx`"):
        efcp_jax.memory_report(efcp_jax.scale_by_mfac, PARAMS)


FORBIDDEN_MODULES = {
    "asyncio", "code", "codeop", "ctypes", "dill", "ftplib", "http", "importlib",
    "joblib", "marshal", "multiprocessing", "pickle", "requests", "runpy", "shelve",
    "smtplib", "socket", "ssl", "subprocess", "telnetlib", "urllib", "urllib3",
    "webbrowser", "xmlrpc",
}  # fmt: skip
FORBIDDEN_CALLS = {"__import__", "compile", "eval", "exec"}
FORBIDDEN_METHODS = {"popen", "system", "fork", "import_module"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_the_package_reaches_no_network_and_runs_no_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        assert not {name.split(".")[0] for name in imported} & FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            # As a method, `compile` is JAX's or that of regular expressions.
            assert getattr(node.func, "id", "") not in FORBIDDEN_CALLS
            assert getattr(node.func, "attr", "") not in FORBIDDEN_METHODS


def test_every_dependency_has_a_lower_bound_and_no_upper():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    names = set()
    for requirement in project["dependencies"]:
        name, bound = requirement.split(">=")
        names.add(name)
        assert "<" not in bound
    assert names == {"chex", "jax", "optax"}

"""Parts of JAX that may vanish: which they are, and that nothing depends on them."""

import ast
import pathlib
import subprocess
import sys

import pytest

import efcp_jax


ROOT = pathlib.Path(efcp_jax.__file__).parent
PROMISED_TO_NOBODY = ("jax.experimental", "jax.interpreters", "jax.extend", "jax._src")
MODULES = {
    "jax.experimental.pallas",
    "jax.experimental.pallas.tpu",
    "jax.extend.core.Primitive",
    "jax.extend.mlir.dialects.sdy",
    "jax.interpreters.ad",
    "jax.interpreters.batching",
    "jax.interpreters.mlir",
}
PALLAS = {
    *("pl.BlockSpec", "pl.ds", "pl.multiple_of"),
    *("pl.num_programs", "pl.pallas_call", "pl.program_id", "pl.when"),
    *("pltpu.CompilerParams", "pltpu.HBM", "pltpu.SMEM", "pltpu.VMEM"),
    "pltpu.with_memory_space_constraint",
}


def dotted(node):
    """Return `a.b.c` of an expression, or nothing."""
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return node.id if isinstance(node, ast.Name) else ""


def used(path):
    """Return every dotted name that a file imports or reads."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node)


def test_one_file_reaches_for_them_and_these_are_all():
    names = {path: set(used(path)) for path in ROOT.rglob("*.py")}
    experimental = {
        path.name: {name for name in each if name.startswith(PROMISED_TO_NOBODY)}
        for path, each in names.items()
    }
    assert {k: v for k, v in experimental.items() if v} == {"experimental.py": MODULES}
    every = set().union(*names.values())
    modules = ("pl.", "pltpu.")
    assert {name for name in every if name.startswith(modules)} == PALLAS


def test_every_name_is_looked_for_before_it_is_used():
    from efcp_jax import experimental as parts

    looked_for = {
        *(f"pl.{name}" for name in parts._PALLAS),
        *(f"pltpu.{name}" for name in parts._PALLAS_TPU),
    }
    assert looked_for == PALLAS


# A process of its own imports the package without one name. JAX may go on to use it.
PROGRAM = """
import builtins, sys, warnings

missing = {missing!r}
found = builtins.__import__

def without(name, globals=None, locals=None, fromlist=(), level=0):
    asker = (globals or {{}}).get("__name__", "")
    if asker.partition(".")[0] == "efcp_jax":
        inside = (f"{{name}}.{{each}}" for each in (fromlist or ()))
        for each in (name, *inside):
            if each == missing or each.startswith(missing + "."):
                raise ModuleNotFoundError(f"No module named {{missing!r}}")
    return found(name, globals, locals, fromlist, level)

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 2)
builtins.__import__ = without
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import efcp_jax
for each in caught:
    print("warned:", each.category.__name__, each.message)

warnings.simplefilter("error")
params = {{"w": jnp.sin(jnp.arange(32768.0)).reshape(256, 128), "b": jnp.ones(7)}}
mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,))
rows = NamedSharding(mesh, P("x"))
placed = {{"w": jax.device_put(params["w"], rows), "b": params["b"]}}
placed["b"] = jax.device_put(params["b"], NamedSharding(mesh, P()))
tx = efcp_jax.sparse_mfac(1.0, window_size=4)
for tree in (params, placed):
    updates, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
    print(*(f"{{np.linalg.norm(u):.5f}}" for u in jax.tree.leaves(updates)))
"""


def imported_without(missing):
    """Return the lines that are printed, warnings apart."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(missing=missing)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    warned = [line for line in lines if line.startswith("warned:")]
    return warned, [line for line in lines if line not in warned]


@pytest.fixture(scope="module")
def whole():
    return imported_without("nothing")


def test_with_all_of_them_nothing_is_said(whole):
    warned, steps = whole
    assert warned == []
    assert len(steps) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing",
    [
        *sorted(MODULES),
        *("jax.experimental", "jax.extend", "jax.extend.mlir", "jax.interpreters"),
    ],
)
def test_without_one_there_is_one_warning_and_the_same_step(missing, whole):
    warned, steps = imported_without(missing)
    assert len(warned) == 1
    assert missing in warned[0]
    assert steps == whole[1]


@pytest.mark.parametrize("name", sorted(PALLAS))
def test_a_name_that_moved_is_a_part_that_is_missing(name, monkeypatch):
    from efcp_jax import experimental as parts

    module, attribute = name.split(".")
    make = {"pl": parts._pallas, "pltpu": parts._tpu}[module]
    monkeypatch.delattr(make(), attribute)
    with pytest.warns(UserWarning, match=attribute) as caught:
        assert parts._or(None, make, "it is slower") is None
    assert len(caught) == 1


def test_tpus_take_the_form_of_xla_without_kernels(pretend, monkeypatch):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from efcp_jax.passes import tpu_tiles

    params = jnp.sin(jnp.arange(32768.0)).reshape(256, 128)
    tx = efcp_jax.sparse_ggt(1.0, window_size=4)

    def two_steps():
        state = tx.init(params)
        for gradient in (params, jnp.cos(params)):
            updates, state = jax.jit(tx.update)(gradient, state, params)
        return np.asarray(updates)

    expected = two_steps()
    monkeypatch.setattr(tpu_tiles, "pltpu", None)
    offered, kernels = pretend("tpu")
    found = two_steps()
    assert offered
    assert kernels == set()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)

"""The map of the package, kept by reading its imports."""

import ast
import pathlib
import re
import sys

import pytest

import efcp_jax


pytestmark = pytest.mark.whole

ROOT = pathlib.Path(efcp_jax.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
SOURCES = [path for path in FILES if str(path) != "__init__.py"]

# Compressors, transforms and tools: the names that users and checks call.
PUBLIC = {
    "identity",
    "top_k",
    "low_rank",
    "by_label",
    "error_feedback",
    "scale_by_mfac",
    "scale_by_ggt",
    "mfac",
    "sparse_mfac",
    "low_rank_mfac",
    "ggt",
    "sparse_ggt",
    "low_rank_ggt",
    "memory_report",
    "diagnostics",
    "diagonal_metric",
    "in_metric",
    "inverse_fisher_product",
    "monitor",
}
# What the package depends on, and what no part of it has any business with.
LIBRARIES = {"efcp_jax", "jax", "optax", "chex", "numpy"}
BANNED = {
    # Annotations as strings would hide `optax.ScalarOrSchedule` from Optax's tests.
    "__future__",
    "ctypes",
    "ftplib",
    "http",
    "importlib",
    "marshal",
    "os",
    "pickle",
    "requests",
    "shelve",
    "smtplib",
    "socket",
    "subprocess",
    "urllib",
}
# Words on arguments and their checks, which every room may call.
COMMON = {"_docstrings", "_validate", "_validate_trees"}
# Files of the m x m solver that know platforms.
M_BY_M = {"preconditioners/system.py", "preconditioners/ggt.py"}
# Types of states, for isinstance and annotations.
STATES = {
    "ErrorFeedbackState",
    "MonitorState",
    "ScaleByMfacState",
    "ScaleByGgtState",
}


def floors():
    """Return the floor of every module, 0 the lowest, as the docstring draws them."""
    text = efcp_jax.__doc__.split("Rooms of the house")[1]
    rows = [line.strip().split("   ")[0] for line in text.splitlines()[1:]]
    rows = [line.replace("  ", " ").split() for line in rows if line]
    return {name: level for level, row in enumerate(reversed(rows)) for name in row}


def room(path):
    """Return the module or sub-package that the file belongs to."""
    return path.parts[0].removesuffix(".py")


def imports(path):
    """Return every name that a file imports, `from a import b` as `a.b`."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own_imports(path):
    """Return the modules of this package that a file imports, as dotted names."""
    return [
        name.removeprefix("efcp_jax.")
        for name in imports(path)
        if name.startswith("efcp_jax.")
    ]


def test_every_module_is_on_the_map():
    on_map = set(floors())
    in_tree = {room(path) for path in SOURCES} - COMMON
    assert in_tree == on_map


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_down(path):
    level = floors()
    if room(path) in COMMON:
        assert not own_imports(path)
        return
    for name in own_imports(path):
        target = name.split(".")[0]
        if target not in {*COMMON, room(path)}:
            assert level[target] < level[room(path)], f"{path} imports {name}"


def files_of(name):
    """Return the files of a room."""
    return [path for path in SOURCES if room(path) == name]


@pytest.mark.parametrize("path", files_of("preconditioners"), ids=str)
def test_the_m_by_m_room_knows_no_representation(path):
    targets = {each.split(".")[0] for each in own_imports(path)}
    others = targets - {"preconditioners", "numerics"}
    deep = {name for name in own_imports(path) if name.split(".")[0] in others}
    assert deep <= {"passes.overwrite", "devices.collectives.vary_like"}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_only_passes_and_the_m_by_m_solver_ask_for_the_platform(path):
    if room(path) == "passes" or str(path) in M_BY_M:
        return
    text = (ROOT / path).read_text()
    for name in ("platform_dependent", "default_backend", "device_kind"):
        assert name not in text


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_file_is_two_screens_of_code_at_most(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 220
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            first = node.body[1 if documented and len(node.body) > 1 else 0]
            assert node.end_lineno - first.lineno < 50, node.name


def test_feedback_and_window_know_only_the_protocol():
    protocol = {f"compressors.{each}" for each in ("Compressor", "Space", "ROW_AXIS")}
    protocol |= {f"metrics.{x}" for x in ("DiagonalMetric", "Gradient", "Measured")}
    names = own_imports(pathlib.Path("feedback.py"))
    assert {each for each in names if each.startswith(("comp", "metr"))} <= protocol


@pytest.mark.parametrize("path", FILES, ids=str)
def test_libraries_are_imported_by_their_public_names(path):
    for name in imports(path):
        library, *rest = name.split(".")
        if library != "efcp_jax":
            assert not any(part.startswith("_") for part in rest), name
        assert library in LIBRARIES | sys.stdlib_module_names, name
        assert library not in BANNED, name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_evaluated_read_or_sent(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            banned = {"eval", "exec", "open", "compile", "__import__", "print"}
            assert node.func.id not in banned, f"{path}:{node.lineno}"


def test_public_names_are_those_of_the_design():
    names = {
        name
        for name, value in vars(efcp_jax).items()
        if not name.startswith("_") and getattr(value, "__name__", "") == name
    }
    assert names == PUBLIC | STATES
    for name in names:
        assert getattr(efcp_jax, name).__doc__


def test_init_re_exports_and_does_nothing_else():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    for node in tree.body[1:]:  # behind the docstring
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names)
        else:
            assert ast.unparse(node).startswith("__version__ = ")


def test_the_docstring_names_everything_public():
    named = set(re.findall(r"`(\w+)`", efcp_jax.__doc__))
    assert named >= PUBLIC | STATES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_packages_are_documented(path):
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()

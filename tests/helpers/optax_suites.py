"""Optax's own test suites, run on optimizers of another package.

The suites lie inside optax's wheel. Their lists of optimizers are expanded while the
bodies of the test classes run, so a file is parsed, its lists are replaced, and the
result is executed as a fresh module; nothing is copied, and whatever suite is installed
is the one that runs.
"""

import ast
from collections import Counter
from collections.abc import Collection, Mapping
import os
import pathlib
import re
import sys
import types
from typing import Any
import unittest
from unittest import mock

import jax
import optax


def source(path: str) -> pathlib.Path:
    """Return where the file `path` of optax is, or would be."""
    return pathlib.Path(optax.__file__).parent / path


class _Rewrite(ast.NodeTransformer):
    """Put other values in place of lists, and drop comparisons of JAX's version."""

    def __init__(self, lists: Mapping[str, Any], arguments: Mapping[str, Any]):
        self.lists = dict(lists)
        self.arguments = dict(arguments)
        self.replaced: set[str] = set()
        self.given: dict[str, Any] = {}

    def _give(self, name: str, value: Any) -> ast.Name:
        self.replaced.add(name)
        self.given[f"_given_{name}"] = value
        return ast.Name(f"_given_{name}", ast.Load())

    def visit_Assign(self, node):
        # The first assignment of a list holds its literal; later ones derive from it.
        name = getattr(node.targets[0], "id", None)
        if name in self.lists and name not in self.replaced:
            node.value = self._give(name, self.lists[name])
        return node

    def visit_AugAssign(self, node):
        # What else is put on the list.
        return None if getattr(node.target, "id", None) in self.lists else node

    def visit_FunctionDef(self, node):
        # `@parameterized.named_parameters([...])`, a list without a name.
        if node.name in self.arguments:
            (decorator,) = (
                each
                for each in node.decorator_list
                if isinstance(each, ast.Call) and each.args
            )
            decorator.args = [self._give(node.name, self.arguments[node.name])]
        return self.generic_visit(node)

    def visit_If(self, node):
        # `if jax.__version__ < "0.7.2": self.skipTest(...)` takes 0.10 to be older.
        versioned = any(
            isinstance(each, ast.Attribute) and each.attr == "__version__"
            for each in ast.walk(node.test)
        )
        return None if versioned else self.generic_visit(node)


def load(
    path: str,
    *,
    lists: Mapping[str, Any] = types.MappingProxyType({}),
    arguments: Mapping[str, Any] = types.MappingProxyType({}),
    names: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
) -> types.ModuleType:
    """Execute a file of optax with other optimizers in it, as a fresh module.

    Args:
        path: The file, relative to optax.
        lists: For each global list of the file, what to put in its place.
        arguments: For each test with a list in its decorator, what to put in its place.
        names: For each module that the file imports, what to add to it: where the
            tests look optimizers up by name.

    Returns:
        The module.
    """
    rewrite = _Rewrite(lists, arguments)
    tree = rewrite.visit(ast.parse(source(path).read_text()))
    missing = {*lists, *arguments} - rewrite.replaced
    assert not missing, f"{path} of optax {optax.__version__} has no {missing}"
    module = types.ModuleType("optax_suite_" + re.sub(r"\W", "_", path))
    vars(module).update(rewrite.given)
    code = compile(ast.fix_missing_locations(tree), str(source(path)), "exec")
    # Dataclasses look their module up while they are made, and a suite sets XLA_FLAGS.
    sys.modules[module.__name__] = module
    try:
        with mock.patch.dict(os.environ):
            exec(code, vars(module))
    finally:
        del sys.modules[module.__name__]
    for name, additions in names.items():
        original = vars(getattr(module, name))
        setattr(module, name, types.SimpleNamespace(**{**original, **additions}))
    return module


def functions_of(path: str, case: str) -> set[str]:
    """Return the names of the test functions of the class `case` of a file."""
    tree = ast.parse(source(path).read_text())
    (found,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == case
    )
    names = (node.name for node in found.body if isinstance(node, ast.FunctionDef))
    return {name for name in names if name.startswith("test")}


def run(
    case: type[unittest.TestCase], functions: Collection[str], known: Collection[str]
) -> Counter[str]:
    """Run the cases of the given test functions of a test class.

    Args:
        case: A class of a module from `load`.
        functions: Names of test functions; other tests of the class do not run.
        known: Names of all test functions of the class. The name of a case is that of
            its function with something behind it.

    Returns:
        How many cases of each function ran, were not skipped and passed.

    Raises:
        AssertionError: A case failed or was skipped.
    """
    longest_first = sorted(known, key=len, reverse=True)
    suite, function_of = unittest.TestSuite(), {}
    for name in unittest.defaultTestLoader.getTestCaseNames(case):
        function = next(f for f in longest_first if name.startswith(f))
        if function in functions:
            test = case(name)
            function_of[test.id()] = function
            suite.addTest(test)
    result = unittest.TestResult()
    wide = jax.config.jax_enable_x64
    try:
        suite.run(result)
    finally:
        jax.config.update("jax_enable_x64", wide)  # where a failure left it on
    problems = [*result.failures, *result.errors, *result.skipped]
    report = "\n".join(f"{test.id()}: {text}" for test, text in problems)
    assert not problems, f"{len(problems)} of {result.testsRun} did not pass\n{report}"
    assert result.testsRun == len(function_of)
    return Counter(function_of.values())

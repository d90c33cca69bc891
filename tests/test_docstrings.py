"""What `help` shows of a public function is complete."""

import inspect
import re

import pytest

import efcp_jax
from efcp_jax import _docstrings


pytestmark = pytest.mark.whole

FUNCTIONS = {
    name: value
    for name, value in vars(efcp_jax).items()
    if inspect.isfunction(value) and not name.startswith("_")
}


def section(function, name):
    """Return the lines of a section, without those that continue another."""
    text = inspect.getdoc(function).split(f"\n{name}:\n")[1].split("\n\n")[0]
    return [line for line in text.splitlines() if re.match(r" {4}\S", line)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described_in_the_order_of_the_signature(name):
    described = []
    for line in section(FUNCTIONS[name], "Args"):
        argument, text = line.split(":", 1)
        described.append(argument.strip())
        assert len(text) > 20, line
    assert described == list(inspect.signature(FUNCTIONS[name]).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_docstring_is_finished(name):
    text = inspect.getdoc(FUNCTIONS[name])
    assert "%(" not in text
    assert max(map(len, text.splitlines())) <= 88
    for part in ("Args", "Returns", "Raises", "Examples"):
        assert text.count(f"\n\n{part}:\n    ") == 1, part


def test_what_no_block_speaks_of_is_missed_at_once():
    def function(window_size, unheard_of):
        """Do it.

        %(arguments)s
        """

    with pytest.raises(KeyError, match="unheard_of"):
        _docstrings.documented()(function)


def test_without_docstrings_nothing_is_asked_for():
    def function(unheard_of): ...

    assert _docstrings.documented()(function).__doc__ is None

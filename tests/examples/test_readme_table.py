"""The bytes in the tables are measured, and what the README says to type is code."""

from pathlib import Path
import re

import aliases
from flax import nnx
import jax.numpy as jnp
import optax
import pytest

import efcp_jax


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CHOOSING = (ROOT / "examples" / "guide" / "choosing.md").read_text()
INT8 = [
    ("a sparse one with `value_dtype", "sparse_ggt", {"value_dtype": jnp.int8}),
    ("any of them with `error_dtype", "sparse_ggt", {"error_dtype": jnp.int8}),
]
# Code and bytes of every row of "What to type".
TYPED = re.findall(r"^\|[^|]*\|[^|]*\| `(.*)` \| (\S+) \|$", README, re.MULTILINE)


@pytest.fixture
def digits(load, monkeypatch):
    """Return the parameters of the network of `train_digits.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return nnx.split(load("train_digits").CNN(nnx.Rngs(0)))[1]


def check(tx, params, cell):
    """Compare the bytes a parameter with those that a cell tells."""
    places = len(cell.partition(".")[2])
    per_parameter = efcp_jax.memory_report(tx, params).per_parameter
    assert f"{per_parameter:.{places}f}" == cell


@pytest.mark.parametrize(
    ("start", "name", "given"),
    [*((f"`{name}` ", name, {}) for name in aliases.STRUCTURE), *INT8],
)
def test_measured_bytes_are_those_of_the_digits_network(digits, start, name, given):
    pattern = rf"^\| {re.escape(start)}[^|]*\|[^|]*\| (\S+) \|"
    (cell,) = re.findall(pattern, CHOOSING, flags=re.MULTILINE)
    check(getattr(efcp_jax, name)(1.0, **given), digits, cell)


@pytest.mark.whole
def test_the_readme_has_a_few_rows_to_type():
    assert 6 <= len(TYPED) <= 8


@pytest.mark.whole
@pytest.mark.parametrize(("code", "cell"), TYPED)
def test_what_the_readme_says_to_type_takes_the_bytes_it_says(digits, code, cell):
    names = vars(efcp_jax) | {"jnp": jnp, "optax": optax}
    names["rate"] = optax.cosine_decay_schedule(1.0, 100)
    check(eval(code, names), digits, cell)

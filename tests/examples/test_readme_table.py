"""The measured bytes in the README are those of the optimizers' defaults."""

from pathlib import Path
import re

import aliases
from flax import nnx
import jax.numpy as jnp
import pytest

import efcp_jax


ROOT = Path(__file__).parents[2]
INT8 = [
    ("a sparse one with `value_dtype", "sparse_ggt", {"value_dtype": jnp.int8}),
    ("any of them with `error_dtype", "sparse_ggt", {"error_dtype": jnp.int8}),
]


def measured(start):
    """Return the third cell of the row that starts so."""
    pattern = rf"^\| {re.escape(start)}[^|]*\|[^|]*\| (\S+) \|"
    (cell,) = re.findall(pattern, (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    return cell


@pytest.mark.parametrize(
    ("start", "name", "given"),
    [*((f"`{name}` ", name, {}) for name in aliases.STRUCTURE), *INT8],
)
def test_measured_bytes_are_those_of_the_digits_network(
    load, monkeypatch, start, name, given
):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    network = load("train_digits").CNN(nnx.Rngs(0))
    tx = getattr(efcp_jax, name)(1.0, **given)
    report = efcp_jax.memory_report(tx, nnx.split(network)[1])
    cell = measured(start)
    places = len(cell.partition(".")[2])
    assert f"{report.per_parameter:.{places}f}" == cell

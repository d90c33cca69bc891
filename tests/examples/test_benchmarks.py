"""The benchmarks run, on tiny sizes; they are never timed here."""

import importlib
import json
from pathlib import Path
import sys

import pytest


FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("common", "step", "scaling")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("block_size", [200, 512])  # two arrays, and one of words
def test_step_benchmark_covers_every_optimizer_and_stage(load, tmp_path, block_size):
    load("step").main(["--sizes", "6000,4,0.05,2", "--runs", "1", "--output",
                       str(tmp_path), "--block-size", str(block_size)])  # fmt: skip
    written = json.loads((tmp_path / "step.json").read_text())
    (result,) = written["results"]
    expected = {"sparse M-FAC", "low-rank M-FAC", "dense M-FAC", "AdamW", "muon"}
    assert {*expected, "galore"} <= set(result["milliseconds"])
    assert set(result["stages"]) >= {"select", "inner", "solve", "combine"}
    # AdamW holds two moments and a count.
    assert result["state_bytes"]["AdamW"] == 8 * 6000 + 4
    assert result["bound_milliseconds"] > 0
    assert (tmp_path / "step.png").stat().st_size > 0


def test_scaling_benchmark_fits_an_exponent_for_d_m_and_k(load, tmp_path):
    load("scaling").main(["--size", "2048", "--window-size", "4", "--doublings", "1",
                          "--block-size=512", "--runs", "1", "--output",
                          str(tmp_path)])  # fmt: skip
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert set(written) == {"d", "m", "k"}
    assert (tmp_path / "scaling.png").stat().st_size > 0


def test_fitted_exponent_is_the_power_of_a_power_law(load):
    values = [1.0, 2.0, 4.0, 8.0]
    slope = load("scaling").exponent(values, [3 * v**1.5 for v in values])
    assert slope == pytest.approx(1.5)

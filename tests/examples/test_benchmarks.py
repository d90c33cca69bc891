"""The benchmarks run, on tiny sizes; they are never timed here."""

import importlib
import json
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest


FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("common", "beside", "step", "scaling", "programs")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.slow
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


def test_a_whole_step_is_shown_beside_adamw(load, tmp_path, capsys):
    small = "--width=8 --layers=1 --words=9 --runs=1 --warm=1 --only sparse_ggt"
    load("beside").main([*small.split(), "--output", str(tmp_path)])
    steps = json.loads((tmp_path / "beside.json").read_text())["steps"]
    assert set(steps) == {"AdamW", "sparse_ggt"}
    size = 9 * 8 + 4 * 8**2 + 2 * 4 * 8**2 + 5 * 8 + 4 * 8 + 8
    assert steps["AdamW"]["state_bytes"] == 8 * size + 4
    assert steps["AdamW"]["next_to_adamw"] == 1
    assert "| sparse_ggt |" in capsys.readouterr().out


@pytest.mark.slow
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


PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %inside = f32[8]{0:T(256)} fusion(%x), kind=kLoop, calls=%fused
  ROOT %both = (s32[], /*index=1*/f32[8]{0:T(256)}) tuple(%i, %inside)
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %in.1 = f32[8]{0} scatter(%p, %q, %r), unique_indices=true, to_apply=%add
}

ENTRY %main (g: bf16[4,128], w: u8[2,8,128]) -> f32[8] {
  %g = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = u8[2,8,128]{2,1,0} parameter(1)
  %k = (f32[8]{0:T(256)S(1)}, pred[3]{0}) custom-call(%g, %w), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[4,128]{1,0}}
  %loop = (s32[], f32[8]{0:T(256)}) while(%t), condition=%cond, body=%body
  %many = bf16[8]{0} scatter(%a, %b, %c), unique_indices=false, to_apply=%add
  %whole = s32[8]{0} scatter(%a, %b, %c), to_apply=%add
  ROOT %sorted = f32[8]{0} sort(%many), dimensions={0}, to_apply=%add
}
"""


def test_a_compiled_program_is_read_as_it_is_written(load):
    reading = load("programs").read(PROGRAM)
    # The custom call, two scatters, the sort, and the fusion inside of the loop.
    assert reading.kernels == 5
    assert (reading.atomics, reading.sorts, reading.loops) == (1, 1, 1)
    assert reading.instructions == 11
    assert reading.custom_calls == {"tpu_custom_call": 1}
    assert reading.kernel_bytes == 2 * 4 * 128 + 2 * 8 * 128 + 4 * 8 + 3


def test_what_a_program_here_does_is_seen_in_it(load):
    read = load("programs").read

    def step(x, i):
        scattered = jnp.zeros(8).at[i].add(x)
        return jnp.sort(scattered), jax.lax.while_loop(
            lambda y: y[0] < 1, lambda y: y * y, x
        )

    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    i = jax.ShapeDtypeStruct((8,), jnp.int32)
    reading = read(jax.jit(step).lower(x, i).compile().as_text())
    assert reading.sorts == 1
    assert reading.loops >= 1
    assert reading.kernels >= 2
    none = read(jax.jit(lambda x: 2 * x).lower(x).compile().as_text())
    assert (none.sorts, none.loops, none.atomics, none.kernel_bytes) == (0, 0, 0, 0)


def compiled(*args):
    command = [sys.executable, str(FOLDER / "compiled.py"), *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_compiled_steps_are_printed_and_written(tmp_path):
    run = compiled(
        "--platforms", "cpu", "--cases", "adamw-flat", "--output", str(tmp_path)
    )
    assert run.returncode == 0, run.stderr
    assert "compiled, not run" in run.stdout
    assert "| adamw-flat |" in run.stdout
    (result,) = json.loads((tmp_path / "compiled.json").read_text())
    # Two moments and a count.
    assert result["state_bytes"] == 8 * 11_700_000 + 4
    assert (result["case"], result["platform"]) == ("adamw-flat", "cpu")


def test_what_cannot_be_compiled_is_said_before_anything_is(tmp_path):
    run = compiled("--cases", "adamw-flat", "adam", "--output", str(tmp_path / "out"))
    assert run.returncode == 2
    assert "unknown cases adam; known:" in run.stderr
    assert not (tmp_path / "out").exists()

"""The sharded example runs, and prints what the documentation promises."""

import pathlib
import re
import subprocess
import sys

import pytest


SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "train_sharded.py"


@pytest.mark.slow
def test_the_sharded_example_sends_two_small_sums_and_learns():
    output = subprocess.run(
        [sys.executable, str(SCRIPT), "--parallel", "fsdp", "--steps", "21"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    ).stdout
    collectives = re.findall(r"^  (\S+) of ([\d,]+) numbers$", output, flags=re.M)
    # Of the metric: the matrices' columns, and a mean of each; then the window's rows.
    of_metric = 512 + 512 + 32 + 3
    assert collectives == [("all-reduce", f"{of_metric:,}"), ("all-reduce", "33")]
    whole, held = re.search(
        r"^state: ([\d,]+) bytes, ([\d,]+) on", output, re.M
    ).groups()
    assert int(held.replace(",", "")) < int(whole.replace(",", "")) / 7
    first, *_, last = map(float, re.findall(r"loss (\S+)", output))
    assert last < 0.8 * first

"""More than 2^31 entries on one device: compilers for accelerators take the step."""

import json
from pathlib import Path
import subprocess
import sys

import compiling
import pytest


@pytest.mark.parametrize(
    ("platform", "memory"),
    [
        pytest.param("tpu", 16, marks=pytest.mark.compile_tpu),
        pytest.param("cuda", 80, marks=pytest.mark.compile_cuda),
    ],
)
def test_steps_of_billions_of_parameters_compile(platform, memory):
    if package := compiling.missing(platform):
        pytest.skip(f"`{package}` is not installed")
    worker = Path(compiling.__file__).with_name("large_worker.py")
    run = subprocess.run(
        [sys.executable, str(worker), platform],
        env=compiling.environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found
    assert max(found.values()) < memory

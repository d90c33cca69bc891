"""Steps compiled for devices that are not here, each in a process of its own.

Devices are described before JAX starts, and no option that spares these tests time
reaches the compiler: what is looked at is what users get.
"""

import functools
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = EXAMPLES / "benchmarks"
# One of these holds the compiler.
PACKAGES = {
    "cpu": ("jaxlib",),
    "tpu": ("libtpu",),
    "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
}


def missing(platform: str) -> str | None:
    """Return the package that is missing to compile for `platform`, if one is."""
    packages = PACKAGES[platform]
    return None if any(map(importlib.util.find_spec, packages)) else packages[0]


def environment() -> dict[str, str]:
    """Return the environment of a process that compiles as users do."""
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return own | {
        # Devices are described, not looked for.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(SCRIPTS), str(EXAMPLES), os.environ.get("PYTHONPATH")])
        ),
    }


def output(platform: str, *arguments: str, folder: Path | None = None) -> str:
    """Return what Python prints, called so in `folder`, or skip without compiler."""
    if package := missing(platform):
        pytest.skip(f"`{package}` is not installed")
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@functools.cache
def measure(platform: str, case: str) -> dict[str, Any]:
    """Return what `compiled.py` measures of a case."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--platforms", platform, "--cases", case, "--output", folder]
        output(platform, "compiled.py", *given, folder=SCRIPTS)
        (result,) = json.loads((Path(folder) / "compiled.json").read_text())
    return result


def worker(script: str, platform: str) -> dict[str, Any]:
    """Return what a script of this folder prints, in JSON."""
    path = str(Path(__file__).with_name(script))
    return json.loads(output(platform, path, platform))


def over(result: dict[str, Any], budget: dict[str, float]) -> dict[str, Any]:
    """Return what of a result is above its budget.

    Args:
        result: What `measure` returns.
        budget: The most of each: gigabytes moved, percent of the state that is
            temporary, or a field of the result.

    Returns:
        Found and allowed, of what is above.
    """
    moved = result["moved_bytes"]
    found = result | {
        "gigabytes": None if moved is None else moved / 1e9,
        "percent": 100 * result["temporary_bytes"] / result["state_bytes"],
    }
    return {
        name: (found[name], most) for name, most in budget.items() if found[name] > most
    }

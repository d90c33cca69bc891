"""Training that is killed goes on, bit by bit, from its last checkpoint."""

from pathlib import Path
import subprocess
import sys
import time

import crash_worker
import jax
import numpy as np
import pytest


WORKER = Path(crash_worker.__file__)


def killed(style: str, directory: Path, when, *extra: str) -> None:
    """Start a run and kill it, with no chance to tidy up, once `when(line)` is true."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(WORKER),
        style,
        str(directory),
        *extra,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if when(line.strip()):
                    break
        finally:
            process.kill()
    assert process.returncode == -9


def assert_resumes(style: str, directory: Path) -> int:
    """Compare the resumed run with one that was never killed; return its step."""
    resumed = crash_worker.LOAD[style](directory)
    saved = int(resumed[2])
    assert saved > 0
    assert saved % crash_worker.EVERY == 0
    whole = crash_worker.start()
    for _ in range(saved):
        whole = crash_worker.advance(whole)
    for _ in range(4):
        jax.tree.map(np.testing.assert_array_equal, resumed, whole)
        resumed, whole = crash_worker.advance(resumed), crash_worker.advance(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("style", crash_worker.LOAD)
def test_a_run_killed_while_training_resumes_bit_by_bit(style, tmp_path):
    killed(style, tmp_path, lambda line: line == "step 8")
    assert assert_resumes(style, tmp_path) in (6, 9)


@pytest.mark.slow
def test_a_run_killed_while_writing_a_file_resumes_from_the_one_before(tmp_path):
    killed("flax", tmp_path, lambda line: line == "half", "pause")
    halves = (tmp_path / "checkpoint.tmp").stat().st_size
    assert 0 < halves < (tmp_path / "checkpoint").stat().st_size
    assert assert_resumes("flax", tmp_path) == 2 * crash_worker.EVERY


@pytest.mark.slow
def test_a_run_killed_while_orbax_saves_resumes_from_the_last_complete_step(tmp_path):
    def unfinished(directory):
        return [path for path in directory.iterdir() if "tmp" in path.name]

    def saving(directory):
        def when(line):
            if line != "step 8":
                return False
            # The save behind step 9 is under way as soon as its directory is there.
            deadline = time.monotonic() + 60
            while not unfinished(directory):
                assert time.monotonic() < deadline
            return True

        return when

    # A fast disk may finish between the look and the signal; then look again.
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        killed("orbax", directory, saving(directory))
        if unfinished(directory):
            break
    else:
        pytest.fail("no save was ever interrupted")
    assert assert_resumes("orbax", directory) == 6

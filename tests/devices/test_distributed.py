"""Real processes: train together, save, and go on with other numbers of devices."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest


WORKER = pathlib.Path(__file__).parents[1] / "helpers" / "distributed_worker.py"
SECONDS = 240  # for all processes together; some 40 on an idle machine of two cores


def start(address, process, processes, devices, first, last, directory):
    arguments = [address, process, processes, devices, first, last, directory]
    # The test's own process may force devices and platforms; the workers choose. They
    # compile as quickly as it does.
    hidden = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    flags = os.environ["XLA_FLAGS"].split()
    environment["XLA_FLAGS"] = " ".join(f for f in flags if "device_count" not in f)
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(workers, deadline):
    """Wait for `workers` and return what the failed ones printed."""
    try:
        printed = [w.communicate(timeout=deadline - time.time())[0] for w in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return "".join(
        text for worker, text in zip(workers, printed, strict=True) if worker.returncode
    )


def run_together(processes, devices, first, last, directory, deadline):
    """Run workers that meet at a free port of the loopback interface."""
    for attempt in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        failure = finish(
            [
                start(address, process, processes, devices, first, last, directory)
                for process in range(processes)
            ],
            deadline,
        )
        # Another program may have taken the port in between.
        clash = "address already in use" in failure.lower()
        if not clash or attempt == 2:
            break
    assert not failure, failure


@pytest.mark.slow
def test_processes_save_and_go_on_with_another_number_of_devices(tmp_path):
    deadline = time.time() + SECONDS
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    alone.mkdir()
    reference = start("alone", 0, 1, 1, 0, 9, alone)
    try:
        run_together(2, 2, 0, 4, together, deadline)  # four devices
        run_together(2, 1, 4, 7, together, deadline)  # two devices
        failure = finish([start("alone", 0, 1, 3, 7, 9, together)], deadline)
        assert not failure, failure
        failure = finish([reference], deadline)
        assert not failure, failure
    finally:
        reference.kill()
    with (
        np.load(together / "final_9.npz") as found,
        np.load(alone / "final_9.npz") as expected,
    ):
        assert set(found) == set(expected)
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], atol=2e-5, rtol=0)
            assert np.abs(expected[name]).max() > 0.1

"""More than 2^31 entries on one device: compilers for accelerators take the step."""

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
    found = compiling.worker("large_worker.py", platform)
    assert found
    assert max(found.values()) < memory

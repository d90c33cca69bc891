"""Other libraries around the optimizers, in an environment of their own.

The folder is left out of plain runs, as these libraries are not in the extra `test`.
"""

import importlib.metadata as metadata
import platform

import client_task
import pytest


PACKAGES = (
    "jax",
    "jaxlib",
    "optax",
    "flax",
    "numpyro",
    "equinox",
    "optimistix",
    "gpjax",
    "chex",
    "numpy",
)


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.whole) for name in client_task.STRUCTURE
    ]
)
def name(request):
    """Return the name of an optimizer; every one, whatever `--every` says."""
    return request.param


@pytest.fixture(autouse=True)
def as_they_find_it(promotion):
    """Promote ranks as JAX does by default, which these libraries expect."""


def pytest_terminal_summary(terminalreporter):
    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    terminalreporter.section("versions")
    terminalreporter.write_line(f"Python {platform.python_version()}")
    for package in PACKAGES:
        terminalreporter.write_line(f"{package} {version(package)}")

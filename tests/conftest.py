"""Settings that every test shares; they must be made before JAX starts."""

import importlib.metadata
import os
import tempfile


# Several JAX processes that share the cores make LAPACK's threads wait on each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Most of the time of the tests is compilation. What LLVM is spared changes no result
# that a test may depend on. Of flags given twice the last counts, so a caller's win.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Every core has a worker of its own.
        "--xla_cpu_parallel_codegen_split_count=1",
        # The older way of emitting loops, three times quicker still. Later versions do
        # not have it, and an unknown flag ends the process.
        "--xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax
from jax import lax
import pytest
import tile_cases


jax.config.update("jax_num_cpu_devices", 8)
# Nothing of the package may be promoted silently.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--every",
        type=int,
        default=12,
        metavar="N",
        help="of the cases of a test function the first and every N-th (default 12);"
        " 1 for all, and for the functions that are marked as slow",
    )


def pytest_configure(config):
    """Let all processes of a run share what they compile, and nobody else."""
    if hasattr(config, "workerinput"):
        folder = config.workerinput["programs"]
    else:
        config.programs = tempfile.TemporaryDirectory(prefix="programs-")
        folder = config.programs.name
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        config.programs.cleanup()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tell a process that runs tests where the programs are."""
    node.workerinput["programs"] = node.config.programs.name


# Marks of tests whose every case counts.
_WHOLE = ("whole", "compile_cuda", "compile_tpu", "fuzz")


def pytest_collection_modifyitems(config, items):
    """Leave cases out, and functions only if they are slow."""
    every, seen, kept, left_out = config.getoption("every"), {}, [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        seen[function] = seen.get(function, -1) + 1
        whole = any(map(item.get_closest_marker, _WHOLE))
        kept_here = whole or seen[function] % every == 0
        kept_here &= every == 1 or not item.get_closest_marker("slow")
        (kept if kept_here else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Free what a file has compiled: a process may map 65,530 pieces of memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def promotion():
    """Let arrays of other ranks meet, as a bias and a batch do in layers of Flax."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """Run one test with 64-bit types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def pretend(monkeypatch):
    """Return a function that makes the library take the branches of a platform.

    They run on the CPU, kernels interpreted. The function returns which platforms were
    offered, one list a branch taken, and the names of the kernels that were used.
    """

    def choose_for(platform):
        offered = []

        def choose(*operands, default=None, **platforms):
            offered.append(sorted(platforms))
            return platforms.get(platform, default)(*operands)

        # What was traced before has the branches of the CPU.
        jax.clear_caches()
        monkeypatch.setattr(lax, "platform_dependent", choose)
        return offered, tile_cases.interpret_kernels(monkeypatch)

    yield choose_for
    monkeypatch.undo()
    jax.clear_caches()


@pytest.fixture
def accelerator(pretend):
    """Take every branch that is meant for accelerators of no special kind."""
    return pretend("default")[0]

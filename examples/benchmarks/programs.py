"""Compiled programs: made for devices that are not here, and what can be read off them.

JAX's compilers for TPUs and NVIDIA GPUs come with the packages `jax[tpu]` and
`jax[cuda12]` or `jax[cuda13]`, and compile for a described device. What they return
tells most of what decides the speed of a step: bytes moved, temporaries, kernels.
"""

import collections
import dataclasses
import importlib.util
import math
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np


# The packages of which one holds the compiler of a platform.
COMPILERS = {
    "cpu": ("jaxlib",),
    "tpu": ("libtpu",),
    "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
}
DEVICES = {"cpu": "CPU", "tpu": "TPU v5e", "cuda": "H100"}

_V5E = "v5e:2x2x1"
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64
  name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Operations that a device is given one by one. Others are free, or scalars that run
# between them.
_LAUNCHED = {
    "fusion", "custom-call", "copy", "transpose", "sort", "scatter", "gather", "dot",
    "convolution", "reduce", "reduce-window", "select-and-scatter", "concatenate",
    "pad", "dynamic-slice", "dynamic-update-slice", "cholesky", "triangular-solve",
    "fft", "rng-bit-generator", "all-reduce", "all-gather", "all-to-all",
    "reduce-scatter", "collective-permute", "all-reduce-start", "all-gather-start",
}  # fmt: skip

# Custom calls that are kernels of Pallas. XLA counts no bytes for them.
_PALLAS = ("tpu_custom_call",)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the text of a compiled program says.

    Attributes:
        kernels: How many kernels are launched, those in a loop once.
        atomics: Scatters of floats that do not promise unique places. What they add up
            to on a GPU depends on the order of its atomics.
        sorts: Sorts.
        loops: Loops whose end the host or the device asks for.
        instructions: Instructions of all computations.
        kernel_bytes: Bytes of operands and results of Pallas kernels.
        custom_calls: How often each library function or kernel is called.
    """

    kernels: int
    atomics: int
    sorts: int
    loops: int
    instructions: int
    kernel_bytes: int
    custom_calls: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str


def missing(platform: str) -> str | None:
    """Return which package is missing to compile for `platform`, if one is."""
    packages = COMPILERS[platform]
    return None if any(map(importlib.util.find_spec, packages)) else packages[0]


def described(platform: str) -> list[Any]:
    """Return devices of a platform that need not be here: "tpu" or "cuda"."""
    if platform == "tpu":
        return topologies.get_topology_desc(_V5E, "tpu").devices
    return topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=_H100
    ).devices


def sharding(platform: str) -> NamedSharding | None:
    """Return the placement on one described device; None on the CPU that is here."""
    if platform == "cpu":
        return None
    device = described(platform)[0]
    return NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())


def measure(tx: Any, shapes: Any, platform: str) -> dict[str, Any]:
    """Compile a donated step of `tx` and return what is known of it.

    Args:
        tx: A gradient transformation.
        shapes: Shapes of the parameters, float32.
        platform: "cpu", "tpu" or "cuda".

    Returns:
        Seconds to trace and compile, bytes of state and temporaries, bytes moved, the
        lines of the program that is compiled, and the fields of `Reading`.
    """
    place = sharding(platform)
    struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    params = [struct(shape, np.float32) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype), state)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    start = time.perf_counter()
    lowered = step.lower(params, state, params)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    reading = read(compiled.as_text() or "")
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None  # all three platforms have one
    leaves = jax.tree.leaves(state)
    return {
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "temporary_bytes": memory.temp_size_in_bytes,
        # NVIDIA's compiler does not say what most of its kernels move.
        "moved_bytes": None
        if platform == "cuda"
        else costs.get("bytes accessed", 0.0) + reading.kernel_bytes,
        "lowered_lines": lowered.as_text().count("\n"),
        **dataclasses.asdict(reading),
    }


def read(text: str) -> Reading:
    """Read the text of a compiled program."""
    computations, entry = _parse(text)
    every = [each for body in computations.values() for each in body]
    launched = [
        each
        for name in _reached(computations, entry)
        for each in computations[name]
        if each.opcode in _LAUNCHED
    ]
    calls = collections.Counter(
        target[1]
        for each in every
        if (target := re.search(r'custom_call_target="([^"]*)"', each.rest))
    )
    count = lambda opcode: sum(each.opcode == opcode for each in every)
    return Reading(
        kernels=len(launched),
        atomics=sum(map(_atomic, every)),
        sorts=count("sort"),
        loops=count("while"),
        instructions=len(every),
        kernel_bytes=sum(map(_kernel_bytes, computations.values())),
        custom_calls=dict(calls),
    )


# Tuples hold layouts, which hold tiles: `(f32[8]{0:T(128)}, (s32[]))`.
_NESTED = r"\([^()]*\)"
for _ in range(3):
    _NESTED = rf"\((?:[^()]|{_NESTED})*\)"
_LINE = re.compile(
    rf"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>{_NESTED}|\S+)"
    r" (?P<opcode>[\w-]+)\((?P<rest>.*)"
)
_START = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Return the instructions of every computation, and which one is the first."""
    computations: dict[str, list[_Instruction]] = {}
    body, entry = [], ""
    for line in text.splitlines():
        if start := _START.match(line):
            body = computations[start["name"]] = []
            entry = start["name"] if start["entry"] else entry
        elif found := _LINE.match(line):
            body.append(_Instruction(**found.groupdict()))
    return computations, entry


def _reached(computations: dict[str, list[_Instruction]], entry: str) -> set[str]:
    """Return the computations whose instructions are launched one by one.

    Not those inside a fusion, nor what a reduction or sort calls for each entry.
    """
    found, left = set(), [entry]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for each in computations[name]:
            if each.opcode in ("while", "conditional", "call", "async-start"):
                names = re.findall(r"[\w.-]+", each.rest)
                left += [each for each in names if each in computations]
    return found


def _atomic(each: _Instruction) -> bool:
    floats = re.search(r"\bb?f\d", each.shape)
    unique = "unique_indices=true" in each.rest
    return each.opcode == "scatter" and bool(floats) and not unique


def _kernel_bytes(body: list[_Instruction]) -> int:
    """Return the bytes of operands and results of the Pallas kernels of `body`."""
    shapes = {each.name: each.shape for each in body}
    total = 0
    for each in body:
        operands, _, target = each.rest.partition("), custom_call_target=")
        if target.startswith(tuple(f'"{name}' for name in _PALLAS)):
            names = re.findall(r"%([\w.-]+)", operands)
            total += sum(_bytes(shapes.get(name, "")) for name in [each.name, *names])
    return total


def _bytes(shape: str) -> int:
    """Return the bytes of an array or a tuple of them, written `f32[8,128]`."""
    total = 0
    for kind, axes in re.findall(r"\b([a-z]+\d\w*|pred)\[([\d,]*)\]", shape):
        bits = int((re.findall(r"\d+", kind) or [8])[0])
        total += max(1, bits // 8) * math.prod(map(int, filter(None, axes.split(","))))
    return total

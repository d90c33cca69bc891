#!/bin/bash
# With JAX 0.12 a Pallas kernel for GPUs (Triton) is no longer lowered where there is no
# GPU, unless an abstract device is named; and it warns that it will go.
#
# What one would guess: `jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))` needs no
# GPU, as for every other program. JAX 0.10.2 lowers the kernel. JAX 0.12.0.1 asks which
# compute capability to lower for, finds no device, and raises a RuntimeError, also
# where the compiler is later told of a device by its topology (`target_config`). Under
# an `AbstractMesh` with an `AbstractDevice` of the kind it works, with a
# DeprecationWarning at lowering, where whoever wrote the kernel cannot catch it.
#
# Seen on 2026-11-30:
#     jax 0.10.2    plain: lowered       with a device: lowered, no warning
#     jax 0.12.0.1  plain: RuntimeError  with a device: lowered, DeprecationWarning
#
# Needs Python 3.11 and 3.12 or newer (`OLD` and `NEW` name them), and about 700 MB.
set -euo pipefail
OLD=${OLD:-python3.11} NEW=${NEW:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'END'
import warnings

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AbstractDevice, AbstractMesh

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
MESH = AbstractMesh((1,), ("x",), abstract_device=H100)


def kernel(x, out):
    out[...] = 2 * x[...]


def double(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    params = triton.CompilerParams(num_warps=4)
    return pl.pallas_call(kernel, out_shape=shape, compiler_params=params)(x)


def lower(mesh=None):
    x = jax.ShapeDtypeStruct((256,), "float32")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with jax.sharding.use_abstract_mesh(mesh or AbstractMesh((), ())):
                text = jax.jit(double).trace(x).lower(lowering_platforms=("cuda",)).as_text()
            assert "triton" in text
            result = "lowered"
        except RuntimeError as error:
            result = "no device" if "No supported GPU devices" in str(error) else "other"
    return result, any("Triton" in str(each.message) for each in caught)


print(*lower(), *lower(MESH))
END

measure() {
  "$1" -m venv "$folder/$2"
  "$folder/$2/bin/pip" install -q --disable-pip-version-check "jax==$2" "jaxlib==$2"
  "$folder/$2/bin/python" "$folder/program.py"
}

old=$(measure "$OLD" 0.10.2)
new=$(measure "$NEW" 0.12.0.1)
echo "lowered, warned, lowered with a device, warned:"
echo "JAX 0.10.2: $old"
echo "JAX 0.12.0.1: $new"
[ "$old" = "lowered False lowered False" ]
[ "$new" = "no device True lowered True" ]

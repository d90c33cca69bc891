#!/bin/bash
# JAX 0.12 on CPUs copies a matrix that is transposed in front of LAPACK, where JAX 0.10
# hands it over as it lies.
#
# What one would guess: the transpose of an array that lies row by row is the same memory
# read column by column, which is what LAPACK wants. So `triangular_solve(factor.T, b)` of
# a `factor` that is kept row by row needs no copy, and `triangular_solve(factor, b)` does.
# That was so: XLA made a `bitcast` of the transpose. With JAX 0.12.0.1 it is a kernel
# that copies, and both need room for one more matrix.
#
# Seen on 2026-12-01 on a CPU, bytes of temporaries of a 1024 x 1024 matrix in float32:
#     0.10.2 transposed 4096
#     0.10.2 as it is 4198400
#     0.12.0.1 transposed 4198400
#     0.12.0.1 as it is 4198400
#
# Needs Python 3.12 or newer (`NEW` names it) and about 900 MB of disk.
set -euo pipefail
NEW=${NEW:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'END'
import jax
from jax import lax

SIZE = 1024


def solve(factor, rhs):
    return lax.linalg.triangular_solve(
        factor, rhs[:, None], left_side=True, lower=True
    )


def temporaries(function):
    matrix = jax.ShapeDtypeStruct((SIZE, SIZE), "float32")
    vector = jax.ShapeDtypeStruct((SIZE,), "float32")
    compiled = jax.jit(function).lower(matrix, vector).compile()
    return compiled.memory_analysis().temp_size_in_bytes


for name, function in {
    "transposed": lambda factor, rhs: solve(factor.T, rhs),
    "as it is": solve,
}.items():
    size = temporaries(function)
    print(jax.__version__, name, size)
    print(jax.__version__, name, "copied" if size >= 4 * SIZE**2 else "in place")
END

for version in 0.10.2 0.12.0.1; do
    "$NEW" -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py"
done | tee "$folder/seen"

grep --quiet "0.10.2 transposed in place" "$folder/seen"
grep --quiet "0.10.2 as it is copied" "$folder/seen"
grep --quiet "0.12.0.1 transposed copied" "$folder/seen"
grep --quiet "0.12.0.1 as it is copied" "$folder/seen"

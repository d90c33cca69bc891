#!/bin/bash
# XLA on CPUs compiles what is done with every slice of an array anew, if the slice begins
# at a constant; at places that it learns at run time it compiles the same work once.
#
# What one would guess: a constant is never worse than a number that has to be read. But
# kernels are shared by what is equal to the last digit, and a constant offset is part of
# the kernel: 288 equal leaves that are cut from one vector and scaled are 288 kernels,
# where 288 that come as arguments are one. Behind `lax.optimization_barrier` an offset is
# an operand, `lax.dynamic_slice` of it is one kernel for all, and compiling takes less
# than a third, for a program that does the same work. The other way would cost little: a
# dynamic slice of what is not split over devices checks no bounds beyond a clamp.
#
# Seen on 2026-11-30 with JAX 0.12.0.1 on a CPU of two cores, in seconds of processor time:
#     at constants 4.6
#     at run time 0.2
#     as arguments 0.1
#
# Needs Python 3.12 or newer (`NEW` names it) and about 500 MB of disk.
set -euo pipefail
NEW=${NEW:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'END'
import time

import jax
import jax.numpy as jnp
from jax import lax

LEAVES, ROWS, COLS = 288, 256, 256
SIZE = ROWS * COLS


def leaves(vector, place):
    for i in range(LEAVES):
        cut = lax.dynamic_slice_in_dim(vector, place(i * SIZE), SIZE)
        yield 0.5 * cut.reshape(ROWS, COLS)


def seconds(function, *given):
    lowered = jax.jit(function).lower(*given)
    start = time.process_time()
    lowered.compile()
    return time.process_time() - start


vector = jax.ShapeDtypeStruct((LEAVES * SIZE,), "float32")
arguments = [jax.ShapeDtypeStruct((ROWS, COLS), "float32")] * LEAVES
late = lambda number: lax.optimization_barrier(jnp.int32(number))
found = {
    "at constants": seconds(lambda x: [*leaves(x, int)], vector),
    "at run time": seconds(lambda x: [*leaves(x, late)], vector),
    "as arguments": seconds(lambda *x: [0.5 * each for each in x], *arguments),
}
for name, time in found.items():
    print(name, round(time, 1))
print("a third at most", 3 * found["at run time"] < found["at constants"])
END

"$NEW" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1
found=$("$folder/venv/bin/python" "$folder/program.py")
echo "$found"
[ "$(echo "$found" | tail -1)" = "a third at most True" ]

#!/bin/bash
# XLA on CPUs makes the zeros that a late loop adds to at the start of the program, and
# holds them while everything before the loop is computed.
#
# What one would guess: a program of two phases needs the memory of the larger phase, as
# arrays of the first are free for the second. The zeros with which a loop of the second
# begins are a constant, to be made when the loop does. But what waits for nothing is
# scheduled first: all zeros of all loops are there during the first phase. A zero that
# is computed from a result of the first phase, and is 0 whatever that is, nearly halves
# the memory of the program below.
#
# Seen on 2026-12-01 on a CPU, temporaries in vectors of the program's length, of 8 in
# each phase:
#     0.12.0.1 constant zeros 17.0
#     0.12.0.1 zeros that wait 9.0
# JAX 0.10.2 does the same.
#
# Needs Python 3.12 or newer (`NEW` names it) and about 450 MB of disk.
set -euo pipefail
NEW=${NEW:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'END'
import jax
from jax import lax
import jax.numpy as jnp

SIZE, VECTORS = 1 << 20, 8


def program(waits, vector, places, values):
    # The first phase: some vectors, of which a number is left.
    sorted_ = [lax.sort(vector * (k + 2)) for k in range(VECTORS)]
    number = sum(jnp.vdot(each, sorted_[0]) for each in sorted_)
    zero = jnp.zeros(())
    if waits:
        bits = lax.bitcast_convert_type(number, jnp.int32)
        zero = jnp.minimum(bits & 1, 0).astype(vector.dtype)

    # The second: as many, each made by additions to zeros.
    def made(k):
        def add(i, total):
            return total.at[places[i]].add(values[i] * (number + k))

        return lax.fori_loop(0, len(places), add, jnp.broadcast_to(zero, SIZE))

    totals = [made(k) for k in range(VECTORS)]
    return sum(jnp.vdot(each, totals[0][::-1]) for each in totals)


some = jax.ShapeDtypeStruct
given = (
    some((SIZE,), jnp.float32),
    some((8, 1024), jnp.int32),
    some((8, 1024), jnp.float32),
)
for waits, name in (False, "constant zeros"), (True, "zeros that wait"):
    compiled = jax.jit(program, static_argnums=0).lower(waits, *given).compile()
    size = compiled.memory_analysis().temp_size_in_bytes / (4 * SIZE)
    print(jax.__version__, name, f"{size:.1f}")
END

"$NEW" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/program.py" | tee "$folder/seen"

grep --quiet "constant zeros 1[67]" "$folder/seen"
grep --quiet "zeros that wait [89]" "$folder/seen"

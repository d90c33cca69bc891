#!/bin/bash
# Without 64-bit mode `jnp.argmax` and `jnp.count_nonzero` of an array of more than 2^31
# entries return negative numbers, with neither an error nor a warning.
#
# What one would guess: an error, as from `jax.lax.top_k` and from `x.at[i]` on the same
# array, or a truncation warning, as where int64 is asked for. The dtype of the result is
# int32 whatever the length of the axis, and wraps round. A negative index is a valid one
# in NumPy's sense, so `x[jnp.argmax(x)]` reads another entry. A way round: two axes, each
# shorter than 2^31, and a maximum along one after the other.
#
# Seen on 2026-11-30 with JAX 0.12.0.1 on a CPU, with 2^31 + 16 booleans, of which only
# those from 2^31 + 5 on are true:
#     argmax -2147483643
#     count_nonzero of the opposite -2147483643
#     top_k ValueError
#
# Needs Python 3.12 or newer (`NEW` names it), about 500 MB of disk and 7 GB of memory.
set -euo pipefail
NEW=${NEW:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'END'
import warnings

import jax
import jax.numpy as jnp
import numpy as np

warnings.simplefilter("error")
x = np.zeros(2**31 + 16, bool)
x[2**31 + 5 :] = True
print("argmax", jnp.argmax(x))
np.logical_not(x, out=x)
print("count_nonzero of the opposite", jnp.count_nonzero(x))
try:
    jax.eval_shape(lambda x: jax.lax.top_k(x, 1), jax.ShapeDtypeStruct(x.shape, "int8"))
    print("top_k")
except Exception as error:
    print("top_k", type(error).__name__)
END

"$NEW" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1
found=$("$folder/venv/bin/python" "$folder/program.py")
echo "$found"
[ "$found" = "argmax -2147483643
count_nonzero of the opposite -2147483643
top_k ValueError" ]

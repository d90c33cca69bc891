#!/bin/bash
# A program compiled for a TPU v5e takes more memory with JAX 0.12 than with 0.10: the
# buffer of an output no longer holds temporaries before the output is written.
#
# What one would guess: `3 * sort(2 * x)` needs the sorted numbers once, and the buffer
# that the result is written to in the end can hold them until then, as it is free.
# JAX 0.10.2 does so. JAX 0.12.0.1 keeps outputs apart:
# the temporaries of the same program are larger by the whole output. Where parameters
# are updated in place (donated) nothing changes; a function that returns new arrays of
# the size of its input, such as a transformation of gradients compiled by itself, needs
# up to one more copy of them.
#
# Seen on 2026-11-30 with x of 204.8 MB, compiled for a v5e that is not there:
#     jax 0.10.2    temporaries 204.8 MB, peak  614.4 MB
#     jax 0.12.0.1  temporaries 409.6 MB, peak  819.2 MB
#
# Needs Python 3.11 and 3.12 or newer (`OLD` and `NEW` name them), and about 1 GB.
set -euo pipefail
OLD=${OLD:-python3.11} NEW=${NEW:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'END'
import os

os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
}
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

device = topologies.get_topology_desc("v5e:2x2x1", "tpu").devices[0]
at = SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((400_000, 128), jnp.float32, sharding=at)
program = jax.jit(lambda x: 3 * jnp.sort(2 * x, axis=1)).lower(x).compile()
memory = program.memory_analysis()
print(round(memory.temp_size_in_bytes / memory.output_size_in_bytes))
END

measure() {
  "$1" -m venv "$folder/$2"
  "$folder/$2/bin/pip" install -q --disable-pip-version-check "jax[tpu]==$2"
  "$folder/$2/bin/python" "$folder/program.py" 2>/dev/null | tail -n 1
}

old=$(measure "$OLD" 0.10.2)
new=$(measure "$NEW" 0.12.0.1)
echo "temporaries in outputs: JAX 0.10.2 $old, JAX 0.12.0.1 $new"
[ "$old" = 1 ] && [ "$new" = 2 ]

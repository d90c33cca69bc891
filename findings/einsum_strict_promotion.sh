#!/bin/bash
# Under strict dtype promotion `jnp.einsum` of arrays of one dtype may raise a promotion
# error, if an axis of one operand alone is summed and `preferred_element_type` is wider.
#
# What one would guess: operands that are all bfloat16 have nothing to be promoted, and
# `preferred_element_type=float32` says what to accumulate in. So it is for "bms,bs->bm".
# For "bms,bns->bm", whose axis n belongs to the second operand alone, that axis is summed
# first, in float32, and the product of the two operands is then one of bfloat16 and
# float32, which `jax_numpy_dtype_promotion="strict"` refuses. Even "bs->b" of one array
# raises. An outer and an elementwise product do not. A way round: the context
# `jax.numpy_dtype_promotion("standard")` around the einsum.
#
# Seen on 2026-11-30 with JAX 0.12.0.1 (and 0.10.2):
#     bms,bs->bm     float32
#     bms,bns->bm    TypePromotionError
#     bs->b          TypePromotionError
#     bs,bt->bst     float32
#
# Needs Python 3.12 or newer (`NEW` names it), and about 500 MB.
set -euo pipefail
NEW=${NEW:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'END'
import jax
import jax.numpy as jnp

matrix, row, one = (jnp.ones(s, jnp.bfloat16) for s in ((2, 3, 4), (2, 1, 4), (2, 4)))
CASES = {
    "bms,bs->bm": (matrix, one),
    "bms,bns->bm": (matrix, row),
    "bs->b": (one,),
    "bs,bt->bst": (one, one),
}
for subscripts, arrays in CASES.items():
    with jax.numpy_dtype_promotion("strict"):
        try:
            made = jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32)
            print(subscripts, made.dtype)
        except Exception as error:
            print(subscripts, type(error).__name__)
END

"$NEW" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1
found=$("$folder/venv/bin/python" "$folder/program.py")
echo "$found"
[ "$found" = "bms,bs->bm float32
bms,bns->bm TypePromotionError
bs->b TypePromotionError
bs,bt->bst float32" ]

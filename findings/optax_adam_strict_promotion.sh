#!/bin/bash
# Optax's adam, adamw and muon cannot be used under strict dtype promotion; sgd can.
#
# What one would guess: `jax_numpy_dtype_promotion="strict"`, which libraries of JAX turn
# on in their tests, is kept by an optimizer that trains float32 parameters with float32
# gradients. Correcting the bias of the moments raises a number of Python to the count of
# steps, an int32, which strict promotion refuses: the first update raises
# TypePromotionError. `optax.sgd` with momentum has no count and works.
#
# Seen on 2026-11-30 with Optax 0.2.8 and JAX 0.12.0.1:
#     sgd ok, adam TypePromotionError, adamw TypePromotionError, muon TypePromotionError
#
# Needs Python 3.12 or newer (`NEW` names it), and about 500 MB.
set -euo pipefail
NEW=${NEW:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'END'
import jax
import jax.numpy as jnp
import optax

params = {"w": jnp.ones((4, 3))}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "muon": optax.contrib.muon(0.1),
}
for name, tx in OPTIMIZERS.items():
    with jax.numpy_dtype_promotion("strict"):
        try:
            tx.update(params, tx.init(params), params)
            print(name, "ok")
        except Exception as error:
            print(name, type(error).__name__)
END

"$NEW" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 optax==0.2.8
found=$("$folder/venv/bin/python" "$folder/program.py")
echo "$found"
[ "$found" = "sgd ok
adam TypePromotionError
adamw TypePromotionError
muon TypePromotionError" ]

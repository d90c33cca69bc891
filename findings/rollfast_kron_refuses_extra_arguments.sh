#!/bin/bash
# rollfast's Kron says that it takes Optax's extra arguments, and refuses them.
#
# What one would guess: a `GradientTransformationExtraArgs` takes whatever a training loop
# hands on, such as `value=loss`, and ignores what it does not use; that is what the type
# is for. `kron` of rollfast is one, and the signature of its update ends in
# `**extra_args`, but the step inside of it has no such argument: the update raises a
# TypeError. `optax.with_extra_args_support`, which is there to drop such arguments, trusts
# the type and returns the optimizer as it is; only a plain `GradientTransformation` around
# its two functions, handed to that helper, helps. `prism` and `adamw` of the same package take the argument.
#
# Seen on 2026-11-30 with rollfast 1.3.0, Optax 0.2.8 and JAX 0.12.0.1:
#     adamw GradientTransformationExtraArgs taken
#     prism GradientTransformationExtraArgs taken
#     kron GradientTransformationExtraArgs TypeError
#     kron, with_extra_args_support TypeError
#     kron, GradientTransformation taken
#
# Needs Python 3.12 or newer (`NEW` names it), and about 600 MB.
set -euo pipefail
NEW=${NEW:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'END'
import jax.numpy as jnp
import optax
import rollfast


def told(tx):
    params = {"w": jnp.eye(4)}
    try:
        tx.update(params, tx.init(params), params, value=jnp.float32(1.0))
    except TypeError as error:
        assert "unexpected keyword argument 'value'" in str(error), error
        return "TypeError"
    return "taken"


for name in ("adamw", "prism", "kron"):
    tx = getattr(rollfast, name)(1e-3)
    print(name, type(tx).__name__, told(tx))
kron = rollfast.kron(1e-3)
print("kron, with_extra_args_support", told(optax.with_extra_args_support(kron)))
plain = lambda updates, state, params=None: kron.update(updates, state, params)
plain = optax.with_extra_args_support(optax.GradientTransformation(kron.init, plain))
print("kron, GradientTransformation", told(plain))
END

cat >"$folder/expected" <<'END'
adamw GradientTransformationExtraArgs taken
prism GradientTransformationExtraArgs taken
kron GradientTransformationExtraArgs TypeError
kron, with_extra_args_support TypeError
kron, GradientTransformation taken
END

"$NEW" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    rollfast==1.3.0 optax==0.2.8 jax==0.12.0.1 jaxlib==0.12.0.1
"$folder/venv/bin/python" "$folder/program.py" | tee "$folder/found"
diff "$folder/expected" "$folder/found"

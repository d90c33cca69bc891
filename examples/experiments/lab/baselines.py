"""Optimizers to compare with: Optax's, and those of packages of the extra `peers`.

The latter are imported where one is asked for. What was tried beside them and does not
run is in the README of the experiments.
"""

import importlib

import jax
import optax
from optax.contrib import MuonDimensionNumbers


def sgd(learning_rate, momentum=0.9, nesterov=False, weight_decay=0.0):
    """Momentum with the decay in the gradient, as is usual for it."""
    transform = optax.sgd(learning_rate, momentum, nesterov)
    if not weight_decay:
        return transform
    return optax.chain(optax.add_decayed_weights(weight_decay), transform)


def adamw(b2):
    def make(learning_rate, b1=0.9, b2=b2, eps=1e-8, weight_decay=0.0):
        return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)

    return make


def muon(learning_rate, beta=0.95, weight_decay=0.0):
    """Muon for what lies inside of the model, Adam for its two ends and vectors.

    Updates are scaled to the size of AdamW's, so that one learning rate serves both.
    """
    return optax.contrib.muon(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        adam_b2=0.95,
        muon_weight_dimension_numbers=_inner_matrices(MuonDimensionNumbers),
        consistent_rms=0.2,
    )


def lbfgs(learning_rate, memory_size=10, max_linesearch_steps=20):
    """L-BFGS, for losses that are the same in every step.

    Its line search takes several evaluations a step and finds the length by itself.
    """
    del learning_rate
    search = optax.scale_by_zoom_linesearch(
        max_linesearch_steps, initial_guess_strategy="one"
    )
    return optax.lbfgs(None, memory_size, linesearch=search)


def psgd_kron(
    learning_rate,
    b1=0.9,
    weight_decay=0.0,
    preconditioner_lr=0.1,
    preconditioner_mode="Q0.5EQ1.5",
    max_size_triangular=8192,
    memory_save_mode=None,
):
    """PSGD with Kronecker factors (Li, Stochastic Hessian Fittings with Lie Groups)."""
    kron = _peer("rollfast", "1.3.0").kron(
        learning_rate,
        b1=b1,
        weight_decay=weight_decay,
        preconditioner_lr=preconditioner_lr,
        preconditioner_mode=preconditioner_mode,
        max_size_triangular=max_size_triangular,
        memory_save_mode=memory_save_mode,
    )
    # Its type says that further arguments are taken, its function refuses them.
    update = lambda updates, state, params=None: kron.update(updates, state, params)
    return optax.GradientTransformation(kron.init, update)


def prism(learning_rate, b1=0.95, gamma=1.0, mode="original", weight_decay=0.0):
    """PRISM (Yang, 2026): Muon's step, shrunk where a gradient is unlike its average.

    `mode="bidirectional"` has factors on both sides as Shampoo, of this one step; it is
    cubic in both sides of a matrix, a second a step for 3,136 x 32.
    """
    package = _peer("rollfast", "1.3.0")
    return package.prism(
        learning_rate,
        b1=b1,
        gamma=gamma,
        mode=mode,
        weight_decay=weight_decay,
        adam_b2=0.95,
        prism_weight_dimension_numbers=_inner_matrices(package.MatrixDimensionNumbers),
    )


def _peer(name, version):
    """Return a package of the extra `peers`.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"this optimizer is of the package {name} ({version}; Python 3.12 or newer)"
            f" which cannot be imported: {error}; python -m pip install -e '.[peers]'"
        ) from None


def _inner_matrices(dimension_numbers):
    """Return what names the axes of all matrices but embeddings and the head."""

    def axes(path, leaf):
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 2 or "embed" in name or "head" in name:
            return None
        return dimension_numbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return lambda params: jax.tree_util.tree_map_with_path(axes, params)

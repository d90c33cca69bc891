"""Compressed gradients for Adam and Muon: error feedback in front of them.

What compression drops is added to the next gradient. Without feedback it is lost.

    python examples/05_feedback_for_other_optimizers.py
"""

import optax
import task

import efcp_jax


few = efcp_jax.top_k(4 / 128, block_size=128)
adam = lambda: optax.adam(task.decay(4e-3))
muon = lambda: optax.contrib.muon(task.decay(2e-2))


def dropping():
    """Return the compressor alone: what it drops is gone."""
    feedback = efcp_jax.error_feedback(few)
    # A new state in every step has no error to feed back.
    return optax.stateless(
        lambda updates, params: feedback.update(updates, feedback.init(updates))[0]
    )


task.compare(
    {
        "Adam, 4 of 128": lambda: optax.chain(efcp_jax.error_feedback(few), adam()),
        "Adam, 4 of 128, no feedback": lambda: optax.chain(dropping(), adam()),
        "Muon, 4 of 128": lambda: optax.chain(efcp_jax.error_feedback(few), muon()),
        "Muon in a metric": lambda: efcp_jax.in_metric(
            muon(), efcp_jax.diagonal_metric()
        ),
        "Adam, dense, the reference": adam,
        "Muon, dense, the reference": muon,
    }
)

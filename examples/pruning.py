"""Prune a network by what each weight costs, with the inverse Fisher matrix of M-FAC.

Setting weight i to zero raises the loss by about w_i^2 / (2 [(lambda I + F)^-1]_ii)
(Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon,
1992), where the magnitude |w_i| is the usual score. The diagonal of the inverse is the
mean of z * ((lambda I + F)^-1 z) over vectors z of random signs. F has the rank of the
window, so the two scores differ where the window is not much smaller than the model:
here 512 rows for 1776 weights, and the gain is small and at high sparsity only.

    python examples/pruning.py
"""

import functools

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import efcp_jax


STEPS = 600
BATCH_SIZE = 64
WINDOW = 512
PROBES = 256  # vectors of random signs
DAMPING = 1e-4  # of the scores; that of the training is the default
SPARSITIES = (0.5, 0.7, 0.8, 0.9)  # shares of the weights set to zero

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
keys = jax.random.split(jax.random.key(0), 5)
order = jax.random.permutation(keys[0], len(images))
train, test = order[:1200], order[1200:]
params = {
    "hidden": jax.random.normal(keys[1], (64, 24)) / 8,
    "output": jax.random.normal(keys[2], (24, 10)) / 5,
}


def logits_fn(params, images):
    return jnp.tanh(images @ params["hidden"]) @ params["output"]


def loss_fn(params, batch):
    logits = logits_fn(params, images[batch])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
    return jnp.mean(losses)


# In a metric the window would be that of other parameters at every step.
decay = optax.cosine_decay_schedule(1 / WINDOW, STEPS)
tx = efcp_jax.mfac(decay, WINDOW, metric=None)


def step(carry, batch):
    params, state = carry
    updates, state = tx.update(jax.grad(loss_fn)(params, train[batch]), state, params)
    return (optax.apply_updates(params, updates), state), None


@jax.jit
def inverse_diagonal(state, key):
    """Return the mean of z * (lambda I + F)^-1 z, a tree like the parameters."""

    def probe(key):
        signs = optax.tree.random_like(key, params, jax.random.rademacher)
        product = efcp_jax.inverse_fisher_product(
            signs, state, DAMPING, compressor=efcp_jax.identity()
        )
        return jax.tree.map(jnp.multiply, signs, product)

    probes = jax.lax.map(probe, jax.random.split(key, PROBES), batch_size=32)
    return jax.tree.map(functools.partial(jnp.mean, axis=0), probes)


def pruned(score, sparsity):
    """Return the parameters without the share of them that scores lowest."""
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(score)])
    threshold = jnp.quantile(flat, sparsity)
    return jax.tree.map(lambda w, s: jnp.where(s > threshold, w, 0), params, score)


def accuracy(params):
    right = jnp.argmax(logits_fn(params, images[test]), axis=1) == labels[test]
    return jnp.mean(right)


batches = jax.random.randint(keys[3], (STEPS, BATCH_SIZE), 0, len(train))
(params, state), _ = jax.jit(functools.partial(jax.lax.scan, step))(
    (params, tx.init(params)), batches
)
diagonal = inverse_diagonal(state, keys[4])
scores = {
    "magnitude": jax.tree.map(jnp.abs, params),
    "w^2 / diagonal": jax.tree.map(lambda w, v: w**2 / v, params, diagonal),
}
print(f"accuracy with all weights: {accuracy(params):.3f}")
for name, score in scores.items():
    results = [f"{accuracy(pruned(score, s)):.3f} at {s:.0%}" for s in SPARSITIES]
    print(f"pruned by {name:14}: {', '.join(results)}")

"""Find mislabelled training examples by their influence on the test loss.

Removing example i from training changes the test loss by about
- g_test^T (lambda I + F)^-1 g_i / n, with the gradients g at the trained parameters
(Koh and Liang, Understanding Black-box Predictions via Influence Functions, 2017). The
Fisher matrix F is the one that M-FAC holds anyway, and its inverse is applied once.
A tenth of the training labels are wrong here; examples that harm the test loss most
should be among them. On a task as easy as this, gradients alone tell nearly as much.

    python examples/influence.py
"""

import functools

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import efcp_jax


WRONG = 0.1  # share of the training labels
STEPS = 300
BATCH_SIZE = 64
WINDOW = 64
DAMPING = 1e-3  # of the training and of the influence
INSPECTED = 0.1  # share of the training examples that a person would look at

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
keys = jax.random.split(jax.random.key(0), 6)
order = jax.random.permutation(keys[0], len(images))
train, test = order[:1200], order[1200:]
wrong = jax.random.bernoulli(keys[1], WRONG, (len(train),))
shift = jax.random.randint(keys[2], (len(train),), 1, 10)
train_labels = jnp.where(wrong, (labels[train] + shift) % 10, labels[train])
params = {
    "hidden": jax.random.normal(keys[3], (64, 32)) / 8,
    "output": jax.random.normal(keys[4], (32, 10)) / 6,
}


def loss_fn(params, images, labels):
    logits = jnp.tanh(images @ params["hidden"]) @ params["output"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


tx = efcp_jax.mfac(optax.cosine_decay_schedule(1 / WINDOW, STEPS), WINDOW, DAMPING)


def step(carry, batch):
    params, state = carry
    gradient = jax.grad(loss_fn)(params, images[train[batch]], train_labels[batch])
    updates, state = tx.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None


@jax.jit
def scores(params, state):
    """Return how much each training example raises the test loss, by two measures."""
    test_gradient = jax.grad(loss_fn)(params, images[test], labels[test])
    product = efcp_jax.inverse_fisher_product(
        test_gradient, state, DAMPING, compressor=efcp_jax.identity()
    )
    gradient = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0, 0))(
        params, images[train], train_labels
    )
    # With a label that harms, descent on the example is ascent on the test loss.
    vdot = jax.vmap(optax.tree.vdot, (0, None))
    along = lambda direction: jnp.negative(vdot(gradient, direction))
    return along(product), along(test_gradient)


batches = jax.random.randint(keys[5], (STEPS, BATCH_SIZE), 0, len(train))
(params, state), _ = jax.jit(functools.partial(jax.lax.scan, step))(
    (params, tx.init(params)), batches
)
logits = jnp.tanh(images[test] @ params["hidden"]) @ params["output"]
accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels[test])
print(f"accuracy on the test set, trained on {WRONG:.0%} wrong labels: {accuracy:.3f}")

count = int(INSPECTED * len(train))
print(f"of the {count} training examples that harm the test loss most, mislabelled:")
names = "with the inverse Fisher matrix", "by gradients alone"
for name, score in zip(names, scores(params, state), strict=True):
    found = jnp.mean(wrong[jnp.argsort(-score)[:count]])
    print(f"{name:32} {found:.2f}")
print(f"{'chosen at random':32} {jnp.mean(wrong):.2f}")

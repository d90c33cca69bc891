"""Derivatives through steps, against central differences in float64."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efcp_jax
from efcp_jax.passes import cpu


pytestmark = pytest.mark.usefixtures("x64")

WINDOW, STEPS, F64 = 4, 3, jnp.float64
SHAPES = {"bias": (3,), "kernel": (4, 6)}
WIDE = {"value_dtype": F64, "error_dtype": F64}
ALIASES = {
    "mfac": {},
    "sparse_mfac": {"density": 0.25, "block_size": 8, **WIDE},
    "low_rank_mfac": {"rank": 1},
    "ggt": {},
    "sparse_ggt": {"density": 0.25, "block_size": 8, **WIDE},
    "low_rank_ggt": {"rank": 1},
}
METRICS = {
    None: None,
    "factored": efcp_jax.diagonal_metric(),
    "full": efcp_jax.diagonal_metric(factored=False),
}
COMPRESSORS = {
    "identity": efcp_jax.identity(),
    "all": efcp_jax.top_k(0.25),
    "blocks": efcp_jax.top_k(0.25, block_size=8),
    "large": efcp_jax.top_k(0.02, block_size=300),
    "low_rank": efcp_jax.low_rank(2),
    "by_label": efcp_jax.by_label(
        {"sparse": efcp_jax.top_k(0.4), "thin": efcp_jax.low_rank(1)},
        {"bias": "sparse", "kernel": "thin"},
    ),
}
METHODS = {"mfac": efcp_jax.scale_by_mfac, "ggt": efcp_jax.scale_by_ggt}


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def noisy(params, noise, step):
    """Return the gradient of a loss that is neither quadratic nor deterministic."""
    del step
    return jax.tree.map(lambda p, n: jnp.sin(2 * p) + n, params, noise)


def after_steps(make, gradient=noisy, shapes=None):
    """Return a loss after some steps: of learning rate, ridge, and a shift."""
    shapes = shapes or SHAPES
    noise = {k: numbers(STEPS, *s) for k, s in shapes.items()}
    start = {k: numbers(*s, seed=1) for k, s in shapes.items()}
    along = {k: numbers(*s, seed=2) for k, s in shapes.items()}

    def loss(given):
        rate, ridge, shift = given
        tx = make(rate, ridge)
        first = jax.tree.map(lambda p, d: p + shift * d, start, along)

        def step(carry, inputs):
            params, state = carry
            updates, state = tx.update(gradient(params, *inputs), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = first, tx.init(first)
        params = lax.scan(step, carry, (noise, jnp.arange(STEPS)))[0][0]
        return sum(jnp.sum(jnp.cos(p)) for p in jax.tree.leaves(params))

    return loss


def check(loss, given=(0.1, 0.3, 0.0), step=1e-6, tolerance=1e-5):
    """Assert that both modes equal central differences."""
    given = jnp.asarray(given)
    small = step * jnp.eye(len(given))

    @jax.jit
    def all_of(given):
        above, below = (jax.vmap(loss)(given[None] + s * small) for s in (1, -1))
        modes = jax.jacfwd(loss)(given), jax.grad(loss)(given)
        return (above - below) / (2 * step), *modes

    expected, forward, reverse = map(np.asarray, all_of(given))
    scale = np.abs(expected) + 1e-2
    assert np.all(np.abs(forward - expected) <= tolerance * scale)
    assert np.all(np.abs(reverse - expected) <= tolerance * scale)
    assert np.all(expected != 0)


@pytest.mark.parametrize(
    ("name", "metric"),
    [*((name, "factored") for name in ALIASES), ("mfac", "full"), ("sparse_ggt", None)],
)
def test_optimizers(name, metric):
    def make(rate, ridge):
        given = {"damping" if "mfac" in name else "eps": ridge, **ALIASES[name]}
        alias = getattr(efcp_jax, name)
        return alias(rate, WINDOW, metric=METRICS[metric], **given)

    check(after_steps(make))


def transform(method, rate, ridge, **given):
    tx = METHODS[method](WINDOW, ridge, **given)
    return optax.chain(tx, optax.scale_by_learning_rate(rate))


# A derivative knows no difference between compressors in the solution of a system: each
# is tried with one preconditioner over all leaves, and with the other leaf by leaf.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "leaves"), [("mfac", False), ("ggt", True)])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressors(name, method, leaves):
    make = functools.partial(
        transform,
        method,
        compressor=COMPRESSORS[name],
        block_diagonal=leaves,
        relative=True,
        b1=0.5,
    )
    shapes = {"kernel": (20, 40)} if name == "large" else None
    check(after_steps(make, shapes=shapes))


@pytest.mark.parametrize("name", ["blocks", "by_label"])
def test_error_feedback_by_itself(name):
    def make(rate, ridge):
        tx = efcp_jax.error_feedback(COMPRESSORS[name])
        return optax.chain(tx, optax.scale(1 + ridge), optax.scale(-rate))

    shapes = {"kernel": (20, 40)} if name == "large" else None
    check(after_steps(make, shapes=shapes))


def skipped(params, noise, step):
    made = noisy(params, noise, step)
    return jax.tree.map(lambda g: jnp.where(step == 1, jnp.nan, g), made)


def zero(params, noise, step):
    made = noisy(params, noise, step)
    return jax.tree.map(lambda g: jnp.where(step == 1, 0, g), made)


def vanishing(params, noise, step):
    """Return zeros in the first step, which are none wherever else it begins."""
    made = noisy(params, noise, step)
    away = {k: p - numbers(*p.shape, seed=1) for k, p in params.items()}
    return jax.tree.map(lambda a, g: jnp.where(step == 0, a, g), away, made)


def constant(params, noise, step):
    del noise, step
    return jax.tree.map(jnp.ones_like, params)


@pytest.mark.parametrize("gradient", [skipped, zero, vanishing, constant])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_special_kind(method, gradient):
    leaves = gradient is vanishing
    make = functools.partial(transform, method, block_diagonal=leaves)
    check(after_steps(make, gradient))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "compressor"), [("mfac", "identity"), ("ggt", "blocks")]
)
def test_a_skipped_gradient_in_a_metric(method, compressor):
    make = functools.partial(
        transform,
        method,
        compressor=COMPRESSORS[compressor],
        metric=efcp_jax.diagonal_metric(),
    )
    check(after_steps(make, skipped))


def gradient_of(dtype, shape, values=None, errors=None, block=2):
    """Return the derivative of a loss after steps on one array of `dtype`."""
    noise, weights = (numbers(2, *shape, seed=i).astype(dtype) for i in (3, 4))

    def loss(given):
        rate, eps, shift = given
        compressor = efcp_jax.top_k(0.5, block_size=block, value_dtype=values)
        tx = transform("ggt", rate, eps, compressor=compressor, error_dtype=errors)
        params = jnp.broadcast_to(shift, shape)
        state = tx.init(params)
        for each in noise:
            updates, state = tx.update(jnp.sin(params) + each, state, params)
            params = jnp.add(params, updates)  # pyright: ignore[reportArgumentType]
        return jnp.mean(params * weights[0])

    given = jnp.asarray([0.1, 0.3, 0.0], dtype)
    return np.asarray(jax.jit(jax.grad(loss))(given), np.float64)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("narrow", [None, jnp.bfloat16])
def test_forms_of_every_platform_are_passed_by(narrow, monkeypatch):
    """Tiles of 128 blocks are for kernels, and narrow errors for rounds on CPUs."""
    monkeypatch.setattr(cpu, "_ENTRIES", 256)
    given = gradient_of(jnp.float32, (1024,), narrow, narrow)
    wanted = gradient_of(jnp.float64, (1024,))
    tolerance = 1e-4 if narrow is None else 0.1
    assert np.all(np.abs(given - wanted) <= tolerance * np.max(np.abs(wanted)))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"values": jnp.int8}, "value_dtype=jnp.float32"),
        ({"values": jnp.float8_e4m3fn}, "value_dtype=jnp.float32"),
        ({"values": jnp.bfloat16, "block": 512}, "value_dtype=jnp.float32"),
        ({"errors": jnp.int8}, "error_dtype=jnp.bfloat16"),
    ],
)
def test_what_is_stored_as_whole_numbers_has_none(given, remedy):
    with pytest.raises(NotImplementedError, match=f"efcp_jax.*{remedy}"):
        gradient_of(jnp.float32, (1024,), **given)

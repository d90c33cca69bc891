"""Bad input: the argument's name, its range, the value and the remedy."""

import functools
import re

import aliases
import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efcp_jax


pytestmark = pytest.mark.whole

MFAC = efcp_jax.scale_by_mfac
GGT = efcp_jax.scale_by_ggt
OPTIMIZERS = {name: getattr(efcp_jax, name) for name in aliases.STRUCTURE}
SPARSE = ("sparse_mfac", "sparse_ggt")
LOW_RANK = ("low_rank_mfac", "low_rank_ggt")
ALIASES = {name: functools.partial(f, 0.1) for name, f in OPTIMIZERS.items()}
BOTH = {"scale_by_mfac": MFAC, "scale_by_ggt": GGT}
EVERY = {**BOTH, **ALIASES}


def some(names):
    return {name: ALIASES[name] for name in names}


MFACS = {name: f for name, f in EVERY.items() if "mfac" in name}
GGTS = {name: f for name, f in EVERY.items() if "ggt" in name}
TOP_K = {"top_k": efcp_jax.top_k, **some(SPARSE)}
BLOCKS = TOP_K
RANK = {"low_rank": efcp_jax.low_rank, **some(LOW_RANK)}
FEEDBACK = {"error_feedback": efcp_jax.error_feedback, **EVERY}
WIDE = {"identity": efcp_jax.identity, **some(("mfac", "ggt")), **RANK}
VALUES = {**WIDE, **TOP_K}
ONE_BLOCK = {
    "top_k": efcp_jax.top_k,
    "top_k-4096": functools.partial(efcp_jax.top_k, block_size=4096),
    "sparse_mfac": functools.partial(ALIASES["sparse_mfac"], block_size=257),
}
F8 = jnp.float8_e4m3fn

# Argument, factories, bad value, error, range or kind, remedy.
BAD = [
    ("window_size", EVERY, 0, ValueError, ">= 1", "window_size=1"),
    ("window_size", EVERY, -3, ValueError, ">= 1", "window_size=1"),
    ("window_size", EVERY, 2.0, TypeError, ">= 1", "window_size=32"),
    ("window_size", EVERY, "8", TypeError, ">= 1", "window_size=32"),
    ("window_size", EVERY, True, TypeError, ">= 1", "window_size=32"),
    ("block_size", BLOCKS, 0, ValueError, ">= 1", "block_size=1"),
    ("block_size", BLOCKS, 4.5, TypeError, ">= 1", "block_size=32"),
    ("rank", RANK, 0, ValueError, ">= 1", "rank=1"),
    ("rank", RANK, 1.5, TypeError, ">= 1", "rank=32"),
    ("density", TOP_K, 0.0, ValueError, "(0, 1]", "density=0.01"),
    ("density", TOP_K, 3.0, ValueError, "(0, 1]", "density=0.01"),
    ("density", TOP_K, -0.1, ValueError, "(0, 1]", "density=0.01"),
    ("density", TOP_K, float("nan"), ValueError, "(0, 1]", "density=0.01"),
    ("density", TOP_K, "0.1", TypeError, "(0, 1]", "density=0.01"),
    ("damping", MFACS, -1e-3, ValueError, "(0, inf)", "1e-5"),
    ("damping", MFACS, 0.0, ValueError, "(0, inf)", "1e-5"),
    ("damping", MFACS, float("nan"), ValueError, "(0, inf)", "1e-5"),
    ("damping", MFACS, "small", TypeError, "(0, inf)", "1e-5"),
    ("damping", MFACS, np.ones(2), TypeError, "(0, inf)", "1e-5"),
    ("eps", GGTS, -1e-9, ValueError, "[0, inf)", "1e-4"),
    ("eps", GGTS, float("inf"), ValueError, "[0, inf)", "1e-4"),
    ("eps", GGTS, "1", TypeError, "[0, inf)", "1e-4"),
    ("b1", GGTS, 1.0, ValueError, "[0, 1)", "0.0"),
    ("b1", GGTS, -0.1, ValueError, "[0, 1)", "0.0"),
    ("b2", GGTS, 0.0, ValueError, "(0, 1]", "1.0"),
    ("b2", GGTS, 1.5, ValueError, "(0, 1]", "1.0"),
    ("momentum", ALIASES, 1.0, ValueError, "[0, 1)", "None"),
    ("momentum", ALIASES, -0.5, ValueError, "[0, 1)", "None"),
    ("weight_decay", ALIASES, -0.01, ValueError, "[0, inf)", "0.0"),
    ("divisor", MFACS, "rows", ValueError, "'window_size' or 'filled'", "'filled'"),
    ("error_feedback", EVERY, 1, TypeError, "True or False", "True"),
    ("skip_nonfinite", FEEDBACK, None, TypeError, "True or False", "True"),
    ("error_dtype", FEEDBACK, jnp.int16, ValueError, "floating", "jnp.int8"),
    ("error_dtype", FEEDBACK, "narrow", TypeError, "floating", "jnp.bfloat16"),
    ("error_dtype", FEEDBACK, F8, ValueError, "16 bits", "jnp.bfloat16"),
    ("value_dtype", WIDE, jnp.int8, ValueError, "16 bits", "of `top_k` only"),
    ("value_dtype", WIDE, F8, ValueError, "16 bits", "of `top_k` only"),
    ("value_dtype", ONE_BLOCK, jnp.int8, ValueError, "tile", "block_size=256"),
    ("value_dtype", ONE_BLOCK, F8, ValueError, "tile", "block_size=256"),
    ("value_dtype", TOP_K, jnp.float8_e5m2, ValueError, "16 bits", "jnp.int8"),
    ("value_dtype", VALUES, jnp.uint8, ValueError, "floating", "jnp.bfloat16"),
    ("value_dtype", VALUES, jnp.complex64, ValueError, "floating", "jnp.bfloat16"),
    (
        "block_diagonal",
        EVERY,
        "yes",
        TypeError,
        "True or False",
        "True",
    ),
]


def shown(value):
    """Return how a message shows `value`."""
    if isinstance(value, np.ndarray):
        return "shape (2,)"
    if isinstance(value, type(jnp.int8)):
        return jnp.dtype(value).name
    return str(value)


@pytest.mark.parametrize(
    ("argument", "factory", "value", "error", "allowed", "remedy"),
    [
        pytest.param(argument, factory, *rest, id=f"{name}-{argument}={rest[0]}")
        for argument, factories, *rest in BAD
        for name, factory in factories.items()
    ],
)
def test_a_factory_refuses(argument, factory, value, error, allowed, remedy):
    with pytest.raises(error) as caught:
        factory(**{argument: value})
    message = str(caught.value)
    for part in (f"`{argument}`", allowed, shown(value), remedy):
        assert part in message


@pytest.mark.parametrize("factory", OPTIMIZERS.values())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.1", None])
def test_a_learning_rate_that_is_no_number_is_refused(factory, value):
    with pytest.raises((TypeError, ValueError), match=f"`learning_rate`.*{value}"):
        factory(value)


@pytest.mark.parametrize("factory", GGTS.values())
def test_b1_above_b2_is_refused(factory):
    with pytest.raises(ValueError, match=r"`b1` must be at most `b2`, got b1=0.9 and"):
        factory(b1=0.9, b2=0.8)


@pytest.mark.parametrize("factory", [efcp_jax.error_feedback, MFAC, GGT])
@pytest.mark.parametrize("value", [0.1, efcp_jax.top_k, "top_k"])
def test_a_compressor_that_is_none_is_refused(factory, value):
    with pytest.raises(TypeError, match=r"`compressor` .*got .*efcp_jax\.top_k\(0\.01"):
        factory(compressor=value)


STRUCTURAL = [
    ("window_size", EVERY, 4),
    ("density", some(SPARSE), 0.5),
    ("block_size", some(SPARSE), 16),
    ("rank", some(LOW_RANK), 2),
]


@pytest.mark.parametrize(
    ("argument", "factory", "value"),
    [
        pytest.param(argument, factory, value, id=f"{name}-{argument}")
        for argument, factories, value in STRUCTURAL
        for name, factory in factories.items()
    ],
)
def test_a_traced_structural_argument_names_the_remedy(argument, factory, value):
    function = getattr(factory, "func", factory)
    rate = {} if function is factory else {"learning_rate": 0.1}
    injected = optax.inject_hyperparams(function)
    remedy = re.escape(f"static_args=('{argument}',)")
    with pytest.raises(TypeError, match=f"`{argument}` .*{remedy}"):
        injected(**rate, **{argument: value}).init(jnp.zeros(3))
    # The remedy works.
    injected = optax.inject_hyperparams(function, static_args=(argument,))
    tx = injected(**rate, **{argument: value})
    params = jnp.ones(3)
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert updates.shape == params.shape


@pytest.mark.parametrize("function", [efcp_jax.top_k, efcp_jax.low_rank])
def test_compressors_refuse_traced_arguments(function):
    with pytest.raises(TypeError, match=r"must be a Python value.*static_args"):
        jax.jit(lambda value: function(value) and 0)(0.5)


@pytest.mark.parametrize(
    "factory", [efcp_jax.error_feedback, *BOTH.values(), *ALIASES.values()]
)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.uint8])
def test_init_refuses_leaves_that_are_not_floating(factory, dtype):
    params = {"weight": jnp.zeros(3), "steps": jnp.zeros(2, dtype)}
    message = rf"floating.*got dtype {jnp.dtype(dtype)} at params\['steps'\].*masked"
    with pytest.raises(ValueError, match=message):
        factory().init(params)


BAD_GRADIENTS = {
    "lacks params['weight']": lambda g: g.pop("weight"),
    "surplus leaf updates['extra']": lambda g: g.update(extra=jnp.zeros(2)),
    "updates['weight'] has shape (3, 2)": lambda g: g.update(weight=jnp.zeros((3, 2))),
}


@pytest.mark.parametrize("message", BAD_GRADIENTS)
@pytest.mark.parametrize(
    "factory", [efcp_jax.error_feedback, MFAC, ALIASES["low_rank_ggt"]]
)
def test_update_refuses_gradients_of_another_tree(factory, message):
    tx, params = factory(), cases.params()
    state, gradients = tx.init(params), cases.params()
    BAD_GRADIENTS[message](gradients)
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(gradients, state, params)


@pytest.mark.parametrize(
    "other",
    [
        MFAC(5, compressor=efcp_jax.top_k(0.5)),
        MFAC(4, compressor=efcp_jax.top_k(0.25)),
        MFAC(4),
        MFAC(4, compressor=efcp_jax.low_rank(2)),
    ],
)
def test_update_refuses_the_state_of_another_configuration(other):
    params = cases.params()
    tx = MFAC(4, compressor=efcp_jax.top_k(0.5))
    with pytest.raises(ValueError, match=r"optimizer state does not fit.*`init`"):
        tx.update(params, other.init(params), params)


@pytest.mark.parametrize("factory", [*ALIASES.values()])
def test_numbers_of_every_kind_are_taken(factory):
    tx = factory(
        window_size=np.int64(3),
        momentum=np.float32(0.5),
        weight_decay=jnp.asarray(0.1),
    )
    state = tx.init(jnp.zeros(2))
    assert jax.tree.leaves(state)

"""Optax's shared suites hold for every optimizer and transformation of the package.

The numbers of cases are asserted: a suite that skips, or no longer finds the optimizer
in its list, fails.
"""

import functools

import jax
import optax
import optax_suites
import pytest

import efcp_jax


# Cases that cannot apply to these optimizers, by name, each with the reason. With the
# newest Optax there are none.
NOT_APPLICABLE: dict[str, str] = {}
if optax_suites.VERSION < (0, 2, 8):
    NOT_APPLICABLE["test_multi_steps_mixed_precision0"] = (
        "`MultiSteps` fails for every optimizer whose updates have the dtype of the"
        " gradients, `optax.sgd` too."
    )

# Four rows keep tens of thousands of steps quick. Structure is bound here and not
# passed on: `inject_hyperparams` makes a tracer of every number it is given, which a
# size cannot be.
_STRUCTURE = {
    "mfac": {},
    "sparse_mfac": {"density": 0.5},
    "low_rank_mfac": {"rank": 1},
    "ggt": {},
    "sparse_ggt": {"density": 0.5},
    "low_rank_ggt": {"rank": 1},
}


def _small(name: str):
    alias = functools.partial(
        getattr(efcp_jax, name), window_size=4, **_STRUCTURE[name]
    )
    if name.endswith("mfac"):

        def mfac(learning_rate: optax.ScalarOrSchedule, damping=1e-2):
            return alias(learning_rate, damping=damping)

        return mfac

    def ggt(learning_rate: optax.ScalarOrSchedule, eps=1e-4):
        return alias(learning_rate, eps=eps)

    return ggt


FACTORIES = {name: _small(name) for name in _STRUCTURE}

# Constant learning rates at which both families solve all of the suites' problems,
# whose curvature goes from 0.4 to 1000.
HYPERPARAMETERS = {
    name: (
        {"learning_rate": 2e-2, "damping": 10.0}
        if name.endswith("mfac")
        else {"learning_rate": 1e-2, "eps": 5.0}
    )
    for name in _STRUCTURE
}
TRANSFORMS = {
    "scale_by_mfac": efcp_jax.scale_by_mfac,
    "scale_by_ggt": efcp_jax.scale_by_ggt,
    "error_feedback": efcp_jax.error_feedback,
}

every_alias = pytest.mark.parametrize("name", FACTORIES)
every_transform = pytest.mark.parametrize("name", [*FACTORIES, *TRANSFORMS])


def check(case, expected: dict[str, int]) -> None:
    """Assert that of each function so many cases pass, and none is skipped."""
    assert optax_suites.run(case, expected, NOT_APPLICABLE) == expected


class _JittedMultiSteps(optax.MultiSteps):
    """Compiles once for each pair of dtypes; outside of jit it would every step."""

    def gradient_transformation(self):
        init, update = super().gradient_transformation()
        return optax.GradientTransformationExtraArgs(init, jax.jit(update))


def _entry(name: str) -> dict:
    return {"opt_name": name, "opt_kwargs": HYPERPARAMETERS[name]}


def make(name: str):
    """Return the transformation `name` with the hyperparameters of the suites."""
    if name in TRANSFORMS:
        return TRANSFORMS[name]()
    return FACTORIES[name](**HYPERPARAMETERS[name])


@every_alias
def test_the_common_suite_of_contrib_passes(name):
    module = optax_suites.load(
        "contrib/_common_test.py",
        lists={"_MAIN_OPTIMIZERS_UNDER_TEST": [_entry(name)], "_BASE_OPTIMIZERS": []},
        names={"contrib": FACTORIES},
    )
    check(
        module.ContribTest,
        {
            "test_optimizers_accept_extra_args": 2,
            "test_optimizers": 4,
            "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
            "test_preserve_dtype": 2,
            "test_gradient_accumulation": 2,
            "test_state_shape_dtype_shard_stability": 4,
            "test_optimizers_accept_learning_rate_schedule": 1,
        },
    )


@every_alias
def test_the_alias_suite_passes(name):
    module = optax_suites.load(
        "_src/alias_test.py",
        lists={"_OPTIMIZERS_UNDER_TEST": (_entry(name),)},
        names={"alias": FACTORIES},
    )
    check(
        module.AliasTest,
        {
            "test_optimization": 4,
            "test_optimizers_accept_extra_args": 1,
            "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
            "test_preserve_dtype": 2,
            "test_state_shape_dtype_shard_stability": 6,
            "test_gradient_accumulation": 2,
        },
    )


@every_transform
def test_the_sharding_suite_passes(name):
    module = optax_suites.load(
        "_src/sharding_test.py", lists={"OPTIMIZERS": {name: make(name)}}
    )
    check(
        module.ShardingTest,
        {
            "test_init_with_abstract_input": 1,
            "test_state_sharding_type_init_match_update": 1,
            "test_state_sharding_type_preserved_with_jit": 1,
        },
    )


@every_transform
def test_the_float64_suite_passes(name):
    module = optax_suites.load(
        "_src/float64_test.py",
        lists={"ALL_MODULES": [(name, functools.partial(make, name), {})]},
    )
    check(module.Float64Test, {"test_mixed_dtype_input_outputs": 1})


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_suite_of_scalers_passes(name):
    module = optax_suites.load(
        "_src/transform_test.py", arguments={"test_scalers": [(name, TRANSFORMS[name])]}
    )
    check(module.TransformTest, {"test_scalers": 1})


@pytest.mark.parametrize("name", ["sgd"] if NOT_APPLICABLE else FACTORIES)
def test_the_accumulation_suite_passes_or_fails_for_sgd_too(name):
    entry = (
        {"opt_name": "sgd", "opt_kwargs": {"learning_rate": 0.1}}
        if name == "sgd"
        else _entry(name)
    )
    module = optax_suites.load(
        "transforms/_accumulation_test.py",
        lists={"OPTIMIZERS_TO_TEST": [entry]},
        names={
            "alias": FACTORIES,
            "_accumulation": {"MultiSteps": _JittedMultiSteps},
        },
    )
    function = "test_multi_steps_mixed_precision"
    if NOT_APPLICABLE:
        with pytest.raises(AssertionError, match="must have equal output types"):
            optax_suites.run(module.AccumulationTest, [function])
    else:
        check(module.AccumulationTest, {function: 1})

"""Optax's shared suites hold for every optimizer and transformation of the package.

The numbers of cases are asserted: a suite that skips, or no longer finds the optimizer
in its list, fails. So does a test that Optax adds to one of the classes, until it runs
here or is named below with the reason.
"""

import functools
from typing import Any

import aliases
import jax
import optax
import optax_suites
import pytest

import efcp_jax


_NO_OPTIMIZER = "It takes no optimizer."
_NUMBERS = "It asserts the numbers of SGD or of another optimizer of Optax."
# Tests that cannot apply to these optimizers, with the reason.
NOT_APPLICABLE = {
    "ContribTest of _BASE_OPTIMIZERS": (
        "`mechanize` tunes the learning rate until rounding stops it, which is with"
        " sparse rows now inside and now just outside of the test's bound."
    ),
    "ShardingTest.test_microbatch_with_explicit_sharding": _NO_OPTIMIZER,
    "AliasTest.test_explicit_dtype": "It is about the buffers of SGD and of Adam.",
    "AccumulationTest.test_ema": _NO_OPTIMIZER,
    "AccumulationTest.test_ema_debias": _NO_OPTIMIZER,
    "AccumulationTest.test_skip_not_finite": _NO_OPTIMIZER,
    "AccumulationTest.test_skip_large_updates": _NO_OPTIMIZER,
    "AccumulationTest.test_multi_steps_computes_mean": _NO_OPTIMIZER,
    "AccumulationTest.test_multi_steps_skip_not_finite": _NUMBERS,
    "ConditionalityTest.test_apply_if_finite": _NUMBERS,
    "PartitionTest.test_partition": _NUMBERS,
    "PartitionTest.test_extra_args": _NO_OPTIMIZER,
    "MaskedTest.test_tree_map_params": _NUMBERS,
    "MaskedTest.test_masked": _NUMBERS,
    "MaskedTest.test_prefix_mask": _NUMBERS,
    "MaskedTest.test_update_requires_params": _NO_OPTIMIZER,
    "MaskedTest.test_mask_fn": _NO_OPTIMIZER,
    "MaskedTest.test_nested_mask": _NUMBERS,
    "MaskedTest.test_masked_state_structure": "It reads the field of SGD's momentum.",
    "MaskedTest.test_mask_compatible_callable_pytree": _NO_OPTIMIZER,
    "ScheduleFreeTest.test_schedule_free_adamw": _NUMBERS,
    "ScheduleFreeTest.test_buffer_donation": _NO_OPTIMIZER,
    "ScheduleFreeTest.test_explicit_dtype": "It skips cases, whatever the optimizer.",
    "BacktrackingLinesearchTest": (
        "All other tests take no optimizer, or are for the direction, the learning rate"
        " or the number of steps of SGD."
    ),
    "ZoomLinesearchTest": "All other tests take no optimizer.",
    "TransformTest": "All other tests are about Optax's own transformations.",
}


def _small(name: str):
    # Four rows keep tens of thousands of steps quick. Structure is bound here and not
    # passed on: `inject_hyperparams` makes a tracer of every number it is given, which
    # a size cannot be.
    variant = aliases.VARIANTS.get(name, {})
    name = name.split("-")[0]
    structure = {**aliases.STRUCTURE[name], **variant, "window_size": 4}
    if "density" in structure:
        structure["density"] = 0.5  # of two or three entries
    alias = functools.partial(getattr(efcp_jax, name), **structure)
    if name.endswith("mfac"):

        def mfac(learning_rate: optax.ScalarOrSchedule, damping=1e-2):
            return alias(learning_rate, damping=damping)

        return mfac

    def ggt(learning_rate: optax.ScalarOrSchedule, eps=1e-4):
        return alias(learning_rate, eps=eps)

    return ggt


FACTORIES = {name: _small(name) for name in aliases.ALL}

# Constant learning rates at which both families solve all of the suites' problems,
# whose curvature goes from 0.4 to 1000.
HYPERPARAMETERS = {
    name: (
        {"learning_rate": 2e-2, "damping": 10.0}
        if "mfac" in name
        else {"learning_rate": 1e-2, "eps": 5.0}
    )
    for name in aliases.ALL
}
TRANSFORMS = {
    "scale_by_mfac": efcp_jax.scale_by_mfac,
    "scale_by_ggt": efcp_jax.scale_by_ggt,
    "error_feedback": efcp_jax.error_feedback,
}

# The two suites of optimizers ask nearly the same: one is for the aliases, the other
# for what else there is. Wrappers see each representation and both methods.
every_alias = pytest.mark.parametrize("name", aliases.STRUCTURE)
every_variant = pytest.mark.parametrize("name", ["mfac", *aliases.VARIANTS])
every_kind = pytest.mark.parametrize("name", ["mfac", "sparse_ggt", "low_rank_mfac"])
every_transform = pytest.mark.parametrize("name", [*FACTORIES, *TRANSFORMS])


def check(path: str, case: str, expected: dict[str, int], **replaced: Any) -> None:
    """Assert that of each function so many cases pass, and none is skipped.

    Args:
        path: A file of Optax.
        case: The class of tests in it.
        expected: Of each test function of the class that applies, the number of cases.
        **replaced: What to replace in the file, see `optax_suites.load`.
    """
    known = optax_suites.functions_of(path, case)
    left_out = {each.removeprefix(f"{case}.") for each in NOT_APPLICABLE}
    if case in NOT_APPLICABLE:
        left_out |= known - expected.keys()
    assert known - left_out == expected.keys() - left_out
    expected = {k: count for k, count in expected.items() if k not in left_out}
    module = optax_suites.load(path, **replaced)
    assert optax_suites.run(getattr(module, case), expected, known) == expected


def _entry(name: str) -> dict:
    return {"opt_name": name, "opt_kwargs": HYPERPARAMETERS[name]}


def make(name: str, **given: Any):
    """Return the transformation `name` with the hyperparameters of the suites."""
    if name in TRANSFORMS:
        return TRANSFORMS[name]()
    return FACTORIES[name](**{**HYPERPARAMETERS[name], **given})


def _jitted(tx: Any) -> Any:
    """Compile once for each pair of dtypes what would compile in every step."""
    compiled = jax.jit(tx.update)

    def update(updates, state, params=None, **extra):
        arrays = {key: value for key, value in extra.items() if not callable(value)}
        return compiled(updates, state, params, **arrays)

    return optax.GradientTransformationExtraArgs(tx.init, update)


class _JittedMultiSteps(optax.MultiSteps):
    def gradient_transformation(self):
        return _jitted(super().gradient_transformation())


@every_variant
def test_the_common_suite_of_contrib_passes(name):
    check(
        "contrib/_common_test.py",
        "ContribTest",
        {
            "test_optimizers_accept_extra_args": 2,
            "test_optimizers": 4,
            "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
            "test_preserve_dtype": 2,
            "test_gradient_accumulation": 2,
            "test_state_shape_dtype_shard_stability": 4,
            "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": (
                1
            ),
        },
        lists={"_MAIN_OPTIMIZERS_UNDER_TEST": [_entry(name)], "_BASE_OPTIMIZERS": []},
        names={"contrib": FACTORIES},
    )


@every_alias
def test_the_alias_suite_passes(name):
    check(
        "_src/alias_test.py",
        "AliasTest",
        {
            "test_optimization": 4,
            "test_optimizers_accept_extra_args": 1,
            "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
            "test_preserve_dtype": 2,
            "test_state_shape_dtype_shard_stability": 6,
            "test_gradient_accumulation": 2,
        },
        lists={"_OPTIMIZERS_UNDER_TEST": (_entry(name),)},
        names={"alias": FACTORIES},
    )


@every_transform
def test_the_sharding_suite_passes(name):
    check(
        "_src/sharding_test.py",
        "ShardingTest",
        {
            "test_init_with_abstract_input": 1,
            "test_state_sharding_type_init_match_update": 1,
            "test_state_sharding_type_preserved_with_jit": 1,
        },
        lists={"OPTIMIZERS": {name: make(name)}},
    )


@every_transform
def test_the_float64_suite_passes(name):
    check(
        "_src/float64_test.py",
        "Float64Test",
        {"test_mixed_dtype_input_outputs": 1},
        lists={"ALL_MODULES": [(name, functools.partial(make, name), {})]},
    )


@every_transform
def test_the_suite_of_scalers_passes(name):
    def scaler():
        return make(name)

    check(
        "_src/transform_test.py",
        "TransformTest",
        {"test_scalers": 1},
        arguments={"test_scalers": [(name, scaler)]},
    )


@every_transform
def test_the_suite_of_complex_parameters_passes(name):
    check(
        "contrib/_complex_valued_test.py",
        "ComplexValuedTest",
        {"test_split_real_and_imaginary": 1},
        arguments={
            "test_split_real_and_imaginary": [(name, functools.partial(make, name))]
        },
    )


# Tests of wrappers that are written with one of Optax's optimizers, but hold for any.
WRAPPERS = {
    "_src/linesearch_test.py": {
        "BacktrackingLinesearchTest": {"test_gradient_descent_with_linesearch": 1},
        "ZoomLinesearchTest": {"test_value_and_grad_from_state": 1},
    },
    "transforms/_accumulation_test.py": {
        "AccumulationTest": {
            "test_multi_steps": 1,
            "test_multi_steps_every_k_schedule": 1,
            "test_multi_steps_mixed_precision": 1,
            "test_multi_steps_scan_dtype_stability": 1,
            "test_multi_steps_zero_nans": 1,
        }
    },
    "transforms/_combining_test.py": {
        "CombiningTest": {"test_chain": 1},
        "PartitionTest": {"test_empty": 3, "test_labels_mismatch": 4},
    },
    "transforms/_conditionality_test.py": {
        "ConditionalityTest": {"test_apply_if_finite_pmap": 1}
    },
    "transforms/_layouts_test.py": {"LayoutsTest": {"test_flatten": 1}},
    "transforms/_masking_test.py": {
        "MaskedTest": {"test_empty": 3, "test_tree_mismatch_fails": 4}
    },
    "transforms/_monitoring_test.py": {
        "MonitoringTest": {"test_snapshot": 1, "test_monitor": 1}
    },
    "contrib/_schedule_free_test.py": {
        "ScheduleFreeTest": {"test_learning_rate_zero": 1, "test_scalar_preservance": 1}
    },
    "experimental/_aggregating_test.py": {
        "AggregatorsTest": {
            "test_aggregation_and_accumulation_match_standard": 1,
            "test_mean_variance_ema_match_standard": 2,
        }
    },
}


def _in_place_of_optax(name: str, path: str) -> dict[str, dict[str, Any]]:
    """Return what has to stand in a file for its own optimizers."""

    def optimizer(learning_rate=HYPERPARAMETERS[name]["learning_rate"], *_, **__):
        return _jitted(make(name, learning_rate=learning_rate))

    def scaler():
        return _jitted(optax.chain(make(name, learning_rate=1.0), optax.scale(-1.0)))

    given = {
        "alias": {name: optimizer, "sgd": optimizer, "adam": optimizer},
        "transform": {"scale_by_adam": scaler},
        "_accumulation": {"MultiSteps": _JittedMultiSteps},
    }
    text = optax_suites.source(path).read_text()
    return {module: each for module, each in given.items() if f"{module}\n" in text}


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize(
    ("path", "case"),
    [(path, case) for path, cases in WRAPPERS.items() for case in cases],
)
def test_the_suites_of_wrappers_pass(name, path, case):
    lists = {}
    if path == "transforms/_accumulation_test.py":
        lists = {"OPTIMIZERS_TO_TEST": [{"opt_name": name, "opt_kwargs": {}}]}
    check(
        path,
        case,
        WRAPPERS[path][case],
        lists=lists,
        names=_in_place_of_optax(name, path),
    )

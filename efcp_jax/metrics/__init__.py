"""Metrics: positive diagonals that gradients are measured in.

Each has `init`, what is known before the first gradient or None, `specs`, the
`PartitionSpec` of each array of that, and `measure`, what it says of a gradient.
"""

from typing import Any, TypeAlias

from efcp_jax.metrics.base import (
    FixedMetric,
    Measured as Measured,
    fixed_metric as fixed_metric,
)
from efcp_jax.metrics.diagonal import DiagonalMetric, diagonal_metric as diagonal_metric
from efcp_jax.metrics.moments import Factored as Factored, MetricState as MetricState


Metric: TypeAlias = DiagonalMetric | FixedMetric


def required(metric: Any) -> Metric:
    """Return `metric`, or raise if it is none."""
    if not isinstance(metric, Metric):
        raise TypeError(
            f"`metric` must be a metric, got {metric!r}. Pass"
            " `efcp_jax.diagonal_metric()`."
        )
    return metric

"""The metric: a positive diagonal that gradients are measured in.

It has `init`, what is known before the first gradient, `specs`, the `PartitionSpec` of
each array of that, and `measure`, what it says of a gradient.
"""

from typing import Any

from efcp_jax.metrics.diagonal import (
    DiagonalMetric as DiagonalMetric,
    diagonal_metric as diagonal_metric,
)
from efcp_jax.metrics.measured import Gradient as Gradient, Measured as Measured
from efcp_jax.metrics.moments import Factored as Factored, MetricState as MetricState


def required(metric: Any) -> DiagonalMetric:
    """Return `metric`, or raise if it is none."""
    if not isinstance(metric, DiagonalMetric):
        raise TypeError(
            f"`metric` must be a metric, got {metric!r}. Pass"
            " `efcp_jax.diagonal_metric()`."
        )
    return metric

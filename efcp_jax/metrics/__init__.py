"""Metrics: positive diagonals that gradients are measured in."""

from efcp_jax.metrics.base import (
    Measured as Measured,
    Metric as Metric,
    fixed_metric as fixed_metric,
)
from efcp_jax.metrics.diagonal import diagonal_metric as diagonal_metric
from efcp_jax.metrics.moments import Factored as Factored, MetricState as MetricState

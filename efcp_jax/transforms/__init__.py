"""The gradient transformations that users chain: error feedback, M-FAC and GGT."""

from efcp_jax.transforms.error_feedback import (
    ErrorFeedbackState as ErrorFeedbackState,
    error_feedback as error_feedback,
)
from efcp_jax.transforms.in_metric import in_metric as in_metric
from efcp_jax.transforms.scale_by_ggt import (
    ScaleByGgtState as ScaleByGgtState,
    scale_by_ggt as scale_by_ggt,
)
from efcp_jax.transforms.scale_by_mfac import (
    ScaleByMfacState as ScaleByMfacState,
    scale_by_mfac as scale_by_mfac,
)

"""Fused normalizations whose statistics reach beyond one plain mini-batch.

Importing the package touches no GPU, needs neither Triton nor the compiled library, and
compiles nothing: backends are looked up when an operator first runs.
"""

from fusednorm import functional, nn
from fusednorm.adapt import AdaptiveModel, adapt_batch_norm
from fusednorm.convert import ConversionReport, convert_norm, revert_norm
from fusednorm.explanation import Explanation, explain
from fusednorm.nn import BatchGroupNorm, BatchNorm, EvalNorm, GroupNorm
from fusednorm.ops.backend import available_backends, backend

__version__ = "0.1.0"

__all__ = [
    "AdaptiveModel",
    "BatchGroupNorm",
    "BatchNorm",
    "ConversionReport",
    "EvalNorm",
    "Explanation",
    "GroupNorm",
    "adapt_batch_norm",
    "available_backends",
    "backend",
    "convert_norm",
    "explain",
    "functional",
    "nn",
    "revert_norm",
]

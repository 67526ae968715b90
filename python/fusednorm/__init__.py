"""Fused normalizations whose statistics reach beyond one plain mini-batch.

Importing the package touches no GPU, needs neither Triton nor the compiled library, and
compiles nothing: backends are looked up when an operator first runs.
"""

from fusednorm import functional, nn
from fusednorm.convert import ConversionReport, convert_norm, revert_norm
from fusednorm.nn import BatchGroupNorm, BatchNorm, GroupNorm
from fusednorm.ops.backend import available_backends, backend

__version__ = "0.1.0"

__all__ = [
    "BatchGroupNorm",
    "BatchNorm",
    "ConversionReport",
    "GroupNorm",
    "available_backends",
    "backend",
    "convert_norm",
    "functional",
    "nn",
    "revert_norm",
]

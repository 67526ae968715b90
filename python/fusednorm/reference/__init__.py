"""The papers' equations in plain differentiable PyTorch, one file a method.

Any floating dtype, any device, no in-place update, no kernel: what every other implementation
in this package is compared with, and what double backward differentiates.
"""

from fusednorm.reference.batch_group_norm import batch_group_norm
from fusednorm.reference.batch_norm import batch_norm
from fusednorm.reference.group_norm import group_norm

__all__ = ["batch_group_norm", "batch_norm", "group_norm"]

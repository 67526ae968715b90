"""Modules: parameters, buffers and state dicts; all arithmetic is in fusednorm.functional."""

from fusednorm.nn.batch_norm import BatchGroupNorm, BatchNorm
from fusednorm.nn.eval_norm import EvalNorm
from fusednorm.nn.group_norm import GroupNorm

__all__ = ["BatchGroupNorm", "BatchNorm", "EvalNorm", "GroupNorm"]

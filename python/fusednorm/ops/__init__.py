"""Operators, their backends and their autograd. See schema.py for the table."""

from fusednorm.ops.backend import resolve
from fusednorm.ops.function import Apply, Config, Normalize
from fusednorm.ops.schema import NAMESPACES

__all__ = ["NAMESPACES", "Apply", "Config", "Normalize", "resolve"]

"""Operators, their backends and their autograd. See schema.py for the table."""

from fusednorm.ops.backend import resolve
from fusednorm.ops.function import (
    Apply,
    Config,
    Normalize,
    Running,
    train_with_gradient,
    train_without_gradient,
)
from fusednorm.ops.schema import NAMESPACES

__all__ = [
    "NAMESPACES",
    "Apply",
    "Config",
    "Normalize",
    "Running",
    "resolve",
    "train_with_gradient",
    "train_without_gradient",
]

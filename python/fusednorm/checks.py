"""What the public functions ask of their arguments, with errors that name them.

Each error says which argument, what was expected and what came. The compiled operators check as
much in C++; there these checks only run once a call has failed, to say it in a caller's words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusednorm.ops.function import Running

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_input(x: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"input: expected at least 2 dimensions (N, C, *), got {x.dim()}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"input: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def check_operands(
    x: Tensor,
    num_groups: int,
    per_sample: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running,
    eps: float,
    training: bool,
    statistics: bool = True,
) -> int:
    """Everything a call could fail at, before anything is launched or changed.

    ``per_sample``: group norm's rules for groups, and no running statistics, as without
    ``statistics``. Returns the elements of a cell, 0 where they do not matter.
    """
    check_input(x)
    _check_groups(x, num_groups, per_sample)
    if statistics and not per_sample:
        _check_running(running, num_groups, training, x)
    count = 0
    if training and (x.shape[0] or not per_sample):
        count = _check_count(x, num_groups, 1 if per_sample else x.shape[0])
    _check_vector("weight", weight, x.shape[1], "the channels of input", x)
    _check_vector("bias", bias, x.shape[1], "the channels of input", x)
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if residual is not None:
        _check_residual(residual, x)
    return count


def _check_groups(x: Tensor, num_groups: int, per_sample: bool) -> None:
    size = x.shape[1] if per_sample else math.prod(x.shape[1:])
    # A symbol where the channels are traced as one.
    if isinstance(num_groups, (int, torch.SymInt)) and num_groups >= 1 and size % num_groups == 0:
        return
    if per_sample:
        raise ValueError(
            f"num_groups: expected a divisor of the {size} channels of input, got {num_groups!r}"
        )
    raise ValueError(
        f"num_groups: expected a divisor of {size}, the channels times the spatial size of "
        f"input {tuple(x.shape)}, got {num_groups!r}"
    )


def _check_count(x: Tensor, num_groups: int, samples: int) -> int:
    """Elements a cell: at least 2, or there is no variance."""
    count = samples * (math.prod(x.shape[1:]) // num_groups)
    if count < 2:
        raise ValueError(
            "input: expected more than 1 value per cell when training, got "
            f"{count} for size {tuple(x.shape)} and num_groups {num_groups}"
        )
    return count


def _check_vector(name: str, v: Tensor | None, size: int, what: str, x: Tensor) -> None:
    if v is None:
        return
    if v.dim() != 1 or v.shape[0] != size:
        raise ValueError(f"{name}: expected shape ({size},), {what}, got {tuple(v.shape)}")
    if not v.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {v.dtype}")
    if v.device != x.device:
        raise RuntimeError(f"{name}: expected device {x.device}, that of input, got {v.device}")


def _check_residual(residual: Tensor, x: Tensor) -> None:
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: expected the shape of input {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    # A float32 skip connection beside a half branch is ordinary under autocast.
    if residual.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"residual: expected the dtype of input {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise RuntimeError(f"residual: expected device {x.device}, got {residual.device}")


def _check_running(running: Running, num_groups: int, training: bool, x: Tensor) -> None:
    mean, var, tracked, momentum = running
    if mean is None or var is None:
        if mean is not var:
            raise ValueError("running_mean and running_var: expected both or neither")
        if not training:
            raise ValueError("running_mean and running_var must be given when not training")
        return
    for name, v in (("running_mean", mean), ("running_var", var)):
        _check_vector(name, v, num_groups, "num_groups", x)
        if v.requires_grad:
            raise ValueError(f"{name}: expected a buffer, got a tensor that requires grad")
    if mean.dtype != var.dtype:
        raise TypeError(
            f"running_var: expected the dtype of running_mean {mean.dtype}, got {var.dtype}"
        )
    if not training:
        return
    if momentum is None and tracked is None:
        raise ValueError("momentum=None needs num_batches_tracked")
    if momentum is not None and not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum: expected a float or None, got {momentum!r}")
    if tracked is None:
        return
    if tracked.numel() != 1 or tracked.dtype != torch.int64:
        raise ValueError(
            "num_batches_tracked: expected one int64, "
            f"got shape {tuple(tracked.shape)} of {tracked.dtype}"
        )
    if tracked.device != x.device:
        raise RuntimeError(f"num_batches_tracked: expected device {x.device}, got {tracked.device}")

"""A training forward, in one of two ways.

``train_eagerly``, for plain eager tensors: one operator, and as little as can be before it. A layer
of a few kilobytes takes the GPU a microsecond or two, so what the host spends on a call is what a
step costs. Arguments are checked here for the composition and for Triton; the compiled operator
checks them itself, and only a call that has failed is looked at again in Python.

``train_in_steps``, for everything else: what torch.compile and torch.func can look into, a
functional operator and then the update of the running statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusednorm.checks import check_operands
from fusednorm.layout import canonical, like
from fusednorm.ops import (
    NAMESPACES,
    Config,
    Normalize,
    Running,
    resolve,
    train_with_gradient,
    train_without_gradient,
)
from fusednorm.reference.cells import NONE, accumulation_dtype

# A named tuple's own constructor binds its arguments in Python.
_new_config = tuple.__new__
_compiling = torch.compiler.is_compiling
_transforming = torch._C._are_functorch_transforms_active


def is_plain(x: Tensor) -> bool:
    """Not under torch.compile, in a torch.func transform, traced, fake or distributed."""
    return not _compiling() and type(x) is Tensor and not _transforming()


def train_eagerly(
    x: Tensor,
    num_groups: int,
    per_sample: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running,
    eps: float,
    act: int,
    slope: float,
) -> Tensor:
    """y of x, which ``is_plain``; running statistics, where given, move."""
    backend = resolve(x)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if backend != "cuda":
        check_operands(x, num_groups, per_sample, weight, bias, residual, running, eps, True)
    # A kernel would drop the tangents of forward-mode differentiation; a Function refuses them.
    narrow = running[0] is not None and running[0].dtype is not wide
    if backend != "reference" and (narrow or forward_ad._current_level >= 0):
        return train_in_steps(
            x, num_groups, per_sample, weight, bias, residual, running, eps, act, slope
        )
    try:
        # The compiled operator takes any groups of a sample, group norm those of whole channels.
        if per_sample and x.shape[1] % num_groups:
            raise ValueError("num_groups")
        if not x.is_contiguous():
            x = canonical(x)
        if weight is not None and weight.dtype is not wide:
            weight = _widened(weight, wide)
        if bias is not None and bias.dtype is not wide:
            bias = _widened(bias, wide)
        gradient = torch.is_grad_enabled() and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
        if residual is not None:
            if residual.dtype is not x.dtype and torch.is_autocast_enabled(x.device.type):
                residual = residual.to(x.dtype)
            residual = like(residual, x)
        if backend == "reference" and _is_atens(x, num_groups, per_sample, residual, running, act):
            return _batch_norm(x, weight, bias, running, eps)
        config = _new_config(Config, (num_groups, per_sample, eps, act, slope, backend, gradient))
        call = train_with_gradient if gradient else train_without_gradient
        y: Tensor = call(x, weight, bias, residual, running, config)
        return y
    except Exception:
        if backend == "reference":
            raise
        check_operands(x, num_groups, per_sample, weight, bias, residual, running, eps, True)
        if all(v is None or v.is_contiguous() for v in running[:2]):
            raise
    # Kernels update dense buffers only; theirs is the other way round it.
    return train_in_steps(
        x, num_groups, per_sample, weight, bias, residual, running, eps, act, slope
    )


def train_in_steps(
    x: Tensor,
    num_groups: int,
    per_sample: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running,
    eps: float,
    act: int,
    slope: float,
) -> Tensor:
    """y of any x; running statistics, where given, move."""
    count = check_operands(x, num_groups, per_sample, weight, bias, residual, running, eps, True)
    x, residual = dense(x, residual)
    config = Config(
        num_groups, per_sample, float(eps), act, float(slope), resolve(x), torch.is_grad_enabled()
    )
    y, mean, _, var, _ = Normalize.apply(x, weight, bias, residual, config)
    running_mean, running_var, tracked, momentum = running
    if running_mean is not None and running_var is not None:
        # Kernels take dense buffers as wide as the statistics, or narrower in a .half() module.
        plain = accumulation_dtype(running_mean.dtype) == mean.dtype
        plain = plain and running_mean.is_contiguous() and running_var.is_contiguous()
        backend = resolve(mean) if plain else "reference"
        update = getattr(torch.ops, NAMESPACES[backend]).update_running
        update(running_mean, running_var, tracked, mean, var, momentum, count)
    return y


def dense(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Checked operands, dense in one layout."""
    x = canonical(x)
    return x, None if residual is None else like(residual.to(x.dtype), x)


def _widened(v: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as operators want it; what is no parameter stays as it is, to be refused."""
    return v.to(dtype) if v.is_floating_point() else v


def _is_atens(
    x: Tensor,
    num_groups: int,
    per_sample: bool,
    residual: Tensor | None,
    running: Running,
    act: int,
) -> bool:
    """Whether ATen's batch norm is the composition, all of it."""
    mean, _, _, momentum = running
    return (
        num_groups == x.shape[1]
        and act == NONE
        and residual is None
        and not per_sample
        and not x.is_cuda
        and x.dtype.itemsize >= 4
        and (mean is None or (momentum is not None and mean.dtype is x.dtype))
    )


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float
) -> Tensor:
    mean, var, tracked, momentum = running
    y = torch.batch_norm(x, weight, bias, mean, var, True, momentum or 0.0, eps, False)
    if mean is not None and tracked is not None:
        tracked.add_(1)
    # The strides of a channels-last tensor of rank 3 are not among those ATen keeps.
    return y if y.stride() == x.stride() else like(y, x)

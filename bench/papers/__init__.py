"""Plain PyTorch compositions of the papers' methods, as their published code writes them.

They are the `eager` provider: what a user runs who takes the paper's code, so they keep its
structure and its costs, and add no cleverness of their own. Each is called
``module(x, *extras, residual)`` and has the parameters and buffers of its method; `extras` makes
the extra arguments of a case.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import Paper
from .batch_group import BatchGroupNorm
from .cross_iteration import CrossIterationBatchNorm
from .enhancement import InstanceEnhancementBatchNorm
from .memorized import MemorizedBatchNorm, double_forward
from .neighbours import BatchRenorm, MovingAverageBatchNorm, PositionalNorm, moment_shortcut
from .proxy import ProxyNorm
from .sandwich import (
    SandwichAdaIN,
    SandwichAuxBatchNorm,
    SandwichBatchNorm,
    SandwichNASBatchNorm,
)

if TYPE_CHECKING:
    from ..registry import Case

__all__ = [
    "EXTRAS",
    "PAPERS",
    "WARM_UP",
    "BatchGroupNorm",
    "BatchRenorm",
    "CrossIterationBatchNorm",
    "InstanceEnhancementBatchNorm",
    "MemorizedBatchNorm",
    "MovingAverageBatchNorm",
    "Paper",
    "PositionalNorm",
    "ProxyNorm",
    "SandwichAdaIN",
    "SandwichAuxBatchNorm",
    "SandwichBatchNorm",
    "SandwichNASBatchNorm",
    "capturable",
    "double_forward",
    "exact",
    "extras",
    "moment_shortcut",
]

# Classes, branches and operations of the sandwich cases: CIFAR's classes, clean and adversarial,
# the five operations of NAS-Bench-201.
CLASSES, BRANCHES, OPERATIONS = 10, 2, 5


def _groups(case: Case) -> int:
    return case.op.num_groups(case.dims)


def _of_channels(kind: Callable[..., nn.Module], *more: int) -> Callable[[Case], nn.Module]:
    return lambda case: kind(case.dims[1], *more, act=case.act)


PAPERS: dict[str, Callable[[Case], nn.Module]] = {
    "batch_group_norm": lambda case: BatchGroupNorm(case.dims[1], _groups(case), case.act),
    "cross_iteration_batch_norm": _of_channels(CrossIterationBatchNorm),
    "memorized_batch_norm": _of_channels(MemorizedBatchNorm),
    "instance_enhancement_batch_norm": _of_channels(InstanceEnhancementBatchNorm),
    "sandwich_batch_norm": _of_channels(SandwichBatchNorm, CLASSES),
    "sandwich_aux_batch_norm": _of_channels(SandwichAuxBatchNorm, BRANCHES),
    "sandwich_nas_batch_norm": _of_channels(SandwichNASBatchNorm, OPERATIONS),
    "sandwich_adain": _of_channels(SandwichAdaIN),
    "proxy_norm": lambda case: ProxyNorm(case.dims[1], _groups(case), case.act),
    "positional_norm": lambda case: PositionalNorm(case.act),
    "batch_renorm": _of_channels(BatchRenorm),
    "moving_average_batch_norm": _of_channels(MovingAverageBatchNorm),
}

# Training calls after which a module is in the state it trains in: the history is full.
WARM_UP = {"cross_iteration_batch_norm": 4, "memorized_batch_norm": 4}
# State on the host, or a look at the device: a CUDA graph of it would replay one step for ever.
_ON_THE_HOST = (CrossIterationBatchNorm, MovingAverageBatchNorm)


def capturable(module: nn.Module) -> bool:
    """Whether a CUDA graph of a training call does the same work, and the right one, each time."""
    return not any(isinstance(part, _ON_THE_HOST) for part in module.modules())


Extras = tuple[Any, ...]


def _convolved(x: Tensor) -> tuple[Tensor, Extras]:
    """y = conv(x), still in the graph of a 3x3 convolution of as many channels.

    Its weights have 8 significant bits, so they are the same in every type.
    """
    width = x.shape[1]
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
    steps = torch.randn(conv.weight.shape, generator=generator).mul(32).round().clamp(-127, 127)
    with torch.no_grad():
        conv.weight.copy_(steps / 2.0 ** (5 + math.ceil(math.log2(3 * width**0.5))))
    conv.to(device=x.device, dtype=x.dtype)
    return conv(x), (x, conv)


EXTRAS: dict[str, Callable[[Tensor], tuple[Tensor, Extras]]] = {
    "cross_iteration_batch_norm": _convolved,
    "sandwich_batch_norm": lambda x: (x, (torch.arange(len(x), device=x.device) * 7 % CLASSES,)),
    "sandwich_aux_batch_norm": lambda x: (x, (1,)),
    "sandwich_nas_batch_norm": lambda x: (x, ((3,),)),
    # The style is another tensor of x's sizes, type and layout.
    "sandwich_adain": lambda x: (x, (x.detach().flip(0, 1) * 0.5 + 1,)),
}


def extras(case: Case, x: Tensor) -> tuple[Tensor, Extras]:
    """The tensor to normalize and the arguments between it and the residual, the same each time.

    The tensor is x itself but for cross-iteration, whose y = conv(x) has to be in the graph of the
    convolution's weight; the gradient of interest is then that of y.
    """
    make = EXTRAS.get(case.op.family)
    return (x, ()) if make is None else make(x)


def exact(case: Case, x: Tensor, more: Extras) -> tuple[Tensor, Extras]:
    """The same values as `extras` returned, in float64 and with a graph of their own."""

    def double(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).double()
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().double() if floating else value

    wider = tuple(double(value) for value in more)
    values = x.detach().double()
    if case.op.family != "cross_iteration_batch_norm":
        return values.requires_grad_(), wider
    conv_input, conv = wider
    y = conv(conv_input)
    return y + (values - y).detach(), wider

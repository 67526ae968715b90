"""The norms in plain PyTorch: its own layers, and compositions of views, means and products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import papers
from .registry import ACTIVATIONS, DTYPES, Case, Op

# Their backward does with the result what it needs the argument for elsewhere.
_IN_PLACE: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": functools.partial(F.relu, inplace=True),
    "leaky_relu": functools.partial(F.leaky_relu, inplace=True),
}


class TorchNorm(nn.Module):
    """PyTorch's own norm, then the residual, then the activation: three ops where ours is one.

    In place where autograd lets them be, as torchvision's networks have them.
    """

    def __init__(self, norm: nn.Module, act: str | None) -> None:
        super().__init__()
        self.norm = norm
        self.act = _IN_PLACE.get(act, ACTIVATIONS[act])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z: Tensor = self.norm(x)
        return self.act(z if residual is None else z.add_(residual))


class PlainNorm(nn.Module):
    """The norm of groups or samples as a paper's code writes it."""

    def __init__(
        self, num_features: int, num_groups: int, per_sample: bool, act: str | None
    ) -> None:
        super().__init__()
        self.num_groups, self.per_sample, self.act = num_groups, per_sample, ACTIVATIONS[act]
        self.eps, self.momentum = 1e-5, 0.1
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.register_buffer("running_mean", None if per_sample else torch.zeros(num_groups))
        self.register_buffer("running_var", None if per_sample else torch.ones(num_groups))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        flat = x.reshape(len(x), self.num_groups, -1).to(wide)
        axes = (2,) if self.per_sample else (0, 2)
        var, mean = torch.var_mean(flat, axes, correction=0, keepdim=True)
        z = ((flat - mean) * torch.rsqrt(var + self.eps)).view(x.shape)
        if self.running_mean is not None and self.running_var is not None:
            count = flat.numel() // self.num_groups
            mean, unbiased = mean.flatten(), var.flatten() * (count / max(count - 1, 1))
            with torch.no_grad():
                for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.lerp_(new.to(running.dtype), self.momentum)
        per_channel = (1, -1) + (1,) * (x.dim() - 2)
        z = z * self.weight.view(per_channel) + self.bias.view(per_channel)
        z = z if residual is None else z + residual
        return self.act(z).to(x.dtype)


# Judged by a composition other than the paper's own.
_PLAIN = ("batch_norm", "batch_group_norm", "group_norm")


def torch_norm(case: Case) -> nn.Module:
    """PyTorch's own layer for the case."""
    channels, dtype = case.dims[1], DTYPES[case.dtype]
    if case.op.per_sample:
        norm: nn.Module = nn.GroupNorm(case.op.num_groups(case.dims), channels)
    else:
        kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        norm = kinds[len(case.dims)](channels)
    # Group norm wants parameters of the input's type, batch norm fp32 ones for half precision.
    if case.op.per_sample or dtype == torch.float64:
        norm.to(dtype)
    return TorchNorm(norm, case.act)


def composition(case: Case) -> nn.Module:
    """What a user runs who takes the paper's code; for torch's own norms, their formula."""
    return papers.PAPERS.get(case.op.family, judge)(case)


def judge(case: Case) -> nn.Module:
    """The formula that float64 is asked for."""
    if case.op.family not in _PLAIN:
        return papers.PAPERS[case.op.family](case)
    groups = case.op.num_groups(case.dims)
    return PlainNorm(case.dims[1], groups, case.op.per_sample, case.act)


def standard(case: Case) -> Case:
    """The case whose error in PyTorch is the measure of everyone's: itself, or batch norm's for
    batch group norm, of which PyTorch has none."""
    grouped = case.op.family == "batch_group_norm"
    return replace(case, op=Op("batch_norm")) if grouped else case


def fair(case: Case) -> nn.Module:
    """PyTorch's answer in the case's own type: its norm of the kind, else the paper's code."""
    return (torch_norm if case.op.family in _PLAIN else composition)(case)


def argument(case: Case) -> nn.Module:
    """The formula of what the case's activation is applied to."""
    family = case.family.activated or case.op.family
    return judge(replace(case, op=Op(family, case.op.groups), act=None))

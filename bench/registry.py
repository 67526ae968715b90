"""What is measured and by whom: ops with the bytes they cannot avoid, and their providers.

Every provider builds an `nn.Module` called as ``module(x, residual)``, so that what is timed is
what a user would write, running statistics and all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn import functional as F

import fusednorm

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LAYOUTS = ("nchw", "nhwc")
DIRECTIONS = ("forward", "backward", "both")
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
}


def choose(
    kind: str, names: Iterable[str], known: Sequence[str], shown: Sequence[str] | None = None
) -> list[str]:
    """The names, or a ValueError that lists the known ones."""
    names = list(names)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(shown or known)}")
    return names


@dataclass(frozen=True)
class Op:
    """A norm of one family with a fixed number of groups (None: one a channel)."""

    family: str
    groups: int | None = None

    @property
    def name(self) -> str:
        return (
            self.family if self.family == "batch_norm" else f"{self.family}[{self.groups or 'C'}]"
        )

    @property
    def per_sample(self) -> bool:
        return self.family == "group_norm"

    def num_groups(self, dims: Sequence[int]) -> int:
        return dims[1] if self.groups is None else self.groups

    def misfit(self, dims: Sequence[int]) -> str | None:
        """Why this op cannot take a tensor of these sizes, or None."""
        groups = self.num_groups(dims)
        unit, what = dims[1], "C"
        if self.family == "batch_group_norm":
            for size in dims[2:]:
                unit *= size
            what = "C*H*W"
        return f"{groups} groups do not divide {what} = {unit}" if unit % groups else None


OPS = {
    op.name: op
    for op in (
        Op("batch_norm"),
        Op("batch_group_norm"),
        Op("batch_group_norm", 8),
        Op("batch_group_norm", 32),
        Op("batch_group_norm", 128),
        Op("group_norm", 32),
    )
}


@dataclass(frozen=True)
class Case:
    """One measurement short of its provider."""

    op: Op
    dims: tuple[int, ...]
    dtype: str
    layout: str
    direction: str
    act: str | None = None
    residual: bool = False

    @property
    def numel(self) -> int:
        total = 1
        for size in self.dims:
            total *= size
        return total

    @property
    def tensor_bytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


def title(
    direction: str, dims: Sequence[int], dtype: str, layout: str, act: str | None, residual: bool
) -> str:
    """What is measured side by side, in words."""
    sizes = "x".join(map(str, dims))
    fused = ("+ residual" if residual else "") + (f" + {act}" if act else "")
    return f"{direction} ({sizes}) {dtype} {layout} {fused}".strip()


def min_bytes(case: Case) -> int:
    """Bytes no implementation avoids, per-channel vectors neglected.

    Forward reads x (and the residual) and writes y; backward reads x and dy and writes dx. With a
    residual under an activation, backward also writes the residual's gradient and must know the
    activation's slope: one bit an element for relu and leaky_relu, the residual itself for others.
    """
    size = case.tensor_bytes
    forward = 2 * size + (size if case.residual else 0)
    backward = 3 * size
    if case.residual and case.act is not None:
        kinked = case.act in ("relu", "leaky_relu")
        backward += size + (case.numel // 8 if kinked else size)
    return {"forward": forward, "backward": backward, "both": forward + backward}[case.direction]


class TorchNorm(nn.Module):
    """PyTorch's own norm, then the residual, then the activation: three ops where ours is one."""

    def __init__(self, norm: nn.Module, act: str | None) -> None:
        super().__init__()
        self.norm = norm
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z: Tensor = self.norm(x)
        return self.act(z if residual is None else z + residual)


class PlainNorm(nn.Module):
    """The norm written as a paper's code writes it: views, means and elementwise torch."""

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


def _fused(case: Case) -> nn.Module:
    channels, act = case.dims[1], case.act
    if case.op.family == "batch_norm":
        return fusednorm.BatchNorm(channels, act=act)
    groups = case.op.num_groups(case.dims)
    if case.op.per_sample:
        return fusednorm.GroupNorm(channels, groups, act=act)
    return fusednorm.BatchGroupNorm(channels, groups, act=act)


def _plain(case: Case) -> nn.Module:
    groups = case.op.num_groups(case.dims)
    return PlainNorm(case.dims[1], groups, case.op.per_sample, case.act)


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


def _compiled(case: Case) -> nn.Module:
    return cast(nn.Module, torch.compile(_plain(case), dynamic=False))


def _no_gpu(device: str) -> str | None:
    return None if device == "cuda" else "needs a CUDA GPU"


def _backend(name: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        if (reason := _no_gpu(device)) is not None:
            return reason
        known = fusednorm.available_backends()
        return None if name in known else f"backend not available, only {', '.join(known)}"

    return missing


@dataclass(frozen=True)
class Provider:
    """Who computes a case: how its module is built, under which switch, and where it can run."""

    name: str
    build: Callable[[Case], nn.Module]
    families: tuple[str, ...]
    missing: Callable[[str], str | None] = lambda device: None
    switch: Callable[[], AbstractContextManager[Any]] = nullcontext


_ALL = ("batch_norm", "batch_group_norm", "group_norm")
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("cuda", _fused, _ALL, _backend("cuda"), lambda: fusednorm.backend("cuda")),
        Provider("triton", _fused, _ALL, _backend("triton"), lambda: fusednorm.backend("triton")),
        Provider(
            "reference",
            _fused,
            _ALL,
            lambda device: "is our path for the CPU" if device == "cuda" else None,
            lambda: fusednorm.backend("reference"),
        ),
        Provider(
            "cudnn", torch_norm, ("batch_norm",), _no_gpu, lambda: torch.backends.cudnn.flags(True)
        ),
        Provider(
            "native",
            torch_norm,
            ("batch_norm", "group_norm"),
            switch=lambda: torch.backends.cudnn.flags(False),
        ),
        Provider(
            "compile",
            _compiled,
            _ALL,
            # Backward alone is repeated on one graph, whose buffers it must then not reuse.
            switch=lambda: torch._functorch.config.patch(donated_buffer=False),
        ),
        Provider("eager", _plain, _ALL),
    )
}


def select_ops(names: Iterable[str]) -> list[Op]:
    """Ops by name; a family's name means all of its ops."""
    families = {op.family for op in OPS.values()}
    names = choose("op", names, [*OPS, *sorted(families - OPS.keys())])
    return [op for op in OPS.values() if op.name in names or op.family in names]

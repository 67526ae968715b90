"""ResNet-50 by op, provider and format, and the calls that are measured on it.

Formats: "nhwc-bf16" is autocast, so parameters and what the norms keep stay fp32, as users train;
bf16 parameters would round away the very weight differences that cross-iteration norms live on.
For inference the convolutions' weights are bf16. "nchw-fp32" is PyTorch as it starts (TF32 in
convolutions, where the card has it). A format of None is float64, for the gate.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusednorm

from . import papers
from .providers import PROVIDERS
from .registry import FAMILIES, Case, Op
from .resnet import Factory, ResNet50, Unfused, fold

FORMATS = {"nhwc-bf16": ("bfloat16", "nhwc"), "nchw-fp32": ("float32", "nchw")}
OURS = ("cuda", "triton", "reference")
OPS = (
    Op("batch_norm"),
    Op("batch_group_norm", 32),
    Op("cross_iteration_batch_norm"),
    Op("memorized_batch_norm"),
    Op("instance_enhancement_batch_norm"),
    Op("proxy_norm", 32),
)
VARIANTS = {f"resnet50[{op.name}]": op for op in OPS}
# Norms that are affine in evaluation, so that a convolution can take them in.
FOLDABLE = (
    "batch_norm", "batch_group_norm", "cross_iteration_batch_norm", "memorized_batch_norm"
)  # fmt: skip


class NativeBatchNorm2d(nn.BatchNorm2d):
    """PyTorch's own kernels also where cuDNN is on, which the convolutions need."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(input)


class PlainGroupNorm(nn.GroupNorm):
    """Keeps the input's type; autocast alone would leave the whole network's activations fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(input.dtype)


def _eager(op: Op) -> Factory:
    """The papers' compositions; activation and residual as torchvision has them, in place."""

    def make(channels: int, act: str | None, residual: bool) -> nn.Module:
        if op.family == "proxy_norm" and act is not None and not residual:
            return papers.ProxyNorm(channels, op.num_groups((1, channels)), act)
        if op.family == "proxy_norm":
            # Where no activation follows at once, the paper has the group norm alone.
            norm: Any = PlainGroupNorm(op.num_groups((1, channels)), channels)
        elif op.family == "instance_enhancement_batch_norm" and act is None:
            # The published network keeps batch norm on the way around a block.
            norm = nn.BatchNorm2d(channels)
        else:
            case = Case(op, (1, channels, 1, 1), "float32", "nchw", "both")
            norm = papers.PAPERS[op.family](case)
            norm.wants_conv = op.family == "cross_iteration_batch_norm"
        return Unfused(norm, act)

    return make


def fused_class(family: str) -> Any:
    """fusednorm's class of the family, None where this version has none."""
    return getattr(fusednorm, FAMILIES[family].fused, None)


def _fused(op: Op) -> Factory:
    """fusednorm's classes, with as much fused as each takes."""

    def make(channels: int, act: str | None, residual: bool) -> nn.Module:
        family = op.family
        groups: tuple[int, ...] = (op.num_groups((1, channels)),)
        if family == "proxy_norm" and (act is None or residual):
            family = "group_norm"
        elif family == "instance_enhancement_batch_norm" and act is None:
            family, groups = "batch_norm", ()
        elif not FAMILIES[family].grouped:
            groups = ()
        kind = fused_class(family)
        taken = inspect.signature(kind.forward).parameters
        fuses = "act" in inspect.signature(kind).parameters
        fuses = fuses and (not residual or "residual" in taken)
        norm: Any = kind(channels, *groups, **({"act": act} if fuses else {}))
        norm.wants_conv = "conv" in taken
        found: nn.Module = norm if fuses else Unfused(norm, act)
        return found

    return make


def factory(op: Op, provider: str) -> Factory:
    """The norms of one variant."""
    if provider in OURS:
        return _fused(op)
    if provider == "eager":
        return _eager(op)
    kind = nn.BatchNorm2d if provider == "cudnn" else NativeBatchNorm2d
    return lambda channels, act, residual: Unfused(kind(channels), act)


def providers(op: Op, direction: str) -> tuple[str, ...]:
    """Who computes the op's norms. Folding leaves none, so that is measured by the plain one."""
    plain = ("native",) if op.family == "batch_norm" else ("eager",)
    if direction == "infer_folded":
        return plain if op.family in FOLDABLE else ()
    return (*(("cudnn",) if op.family == "batch_norm" else ()), *plain, *OURS)


def switch(provider: str) -> AbstractContextManager[Any]:
    """What a variant's calls run under."""
    return PROVIDERS[provider].switch() if provider in OURS else nullcontext()


@contextmanager
def second_forward(model: nn.Module) -> Iterator[None]:
    """Whichever memorized norms the model has: ours or the composition."""
    ours = getattr(fusednorm, "double_forward", None)
    with papers.double_forward(model), ours(model) if ours else nullcontext(), torch.no_grad():
        yield


@functools.cache
def _weights() -> list[Tensor]:
    """Of convolutions and head, the same for every variant."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        plain = ResNet50(lambda channels, act, residual: nn.Identity())
    return [weight.detach() for weight in plain.weights()]


def autocast(form: str | None, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16, enabled=form == "nhwc-bf16")


def images_and_labels(
    batch: int, side: int, form: str | None, device: str
) -> tuple[Tensor, Tensor]:
    """Random ones; a format of None is float64."""
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, side, side, generator=generator)
    labels = torch.randint(1000, (batch,), generator=generator)
    if form == "nhwc-bf16":
        images = images.bfloat16().contiguous(memory_format=torch.channels_last)
    return (images if form else images.double()).to(device), labels.to(device)


def network(op: Op, provider: str, form: str | None, device: str) -> ResNet50:
    """A variant's network in a format, float64 if None, in training."""
    model = ResNet50(factory(op, provider), _weights()).to(device)
    if form == "nhwc-bf16":
        # The one overload of Module.to that its stubs lack is this.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model if form else model.double()


def for_inference(model: ResNet50, form: str | None, folded: bool) -> ResNet50:
    """In evaluation, folded if asked for, in place."""
    model = fold(model) if folded else model.eval()
    if form == "nhwc-bf16":
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(torch.bfloat16)
    return model.requires_grad_(False)


def train_call(
    model: ResNet50, images: Tensor, labels: Tensor, form: str | None, twice: bool
) -> Callable[[], Tensor]:
    """One training step; returns the loss. `twice` adds the second forward."""
    device = images.device.type
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9, weight_decay=1e-4)

    def step() -> Tensor:
        with autocast(form, device):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        # After the step, so that no gradients lie about between steps of different variants.
        optimizer.zero_grad(set_to_none=True)
        if twice:
            with second_forward(model), autocast(form, device):
                model(images)
        return loss.detach()

    return step


def infer_call(model: ResNet50, images: Tensor, form: str | None) -> Callable[[], Tensor]:
    def infer() -> Tensor:
        with torch.no_grad(), autocast(form, images.device.type):
            logits: Tensor = model(images)
            return logits

    return infer

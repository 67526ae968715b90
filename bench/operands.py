"""The random tensors of a case, and the calls that are checked and timed on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .registry import DTYPES, Case


@dataclass
class Operands:
    """Inputs of one call: x, the gradient of y, and the residual if the case has one."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None

    def to(self, dtype: torch.dtype) -> Operands:
        residual = self.residual
        return Operands(
            self.x.detach().to(dtype).requires_grad_(),
            self.dy.to(dtype),
            None if residual is None else residual.detach().to(dtype).requires_grad_(),
        )


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values, dense, channels last for "nhwc" whatever the rank."""
    if layout == "nchw" or tensor.dim() < 3:
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def make(case: Case, device: str, seed: int) -> Operands:
    """Random operands: N(0, 1) around a mean of its own for each channel, so no mean is zero."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    offset = normal(case.dims[1]).view(1, -1, *(1,) * (len(case.dims) - 2))
    dtype = DTYPES[case.dtype]
    tensors = [normal(*case.dims) + offset, normal(*case.dims)]
    if case.residual:
        tensors.append(normal(*case.dims))
    x, dy, *rest = (_lay_out(tensor.to(dtype), case.layout) for tensor in tensors)
    residual = rest[0].requires_grad_() if rest else None
    return Operands(x.requires_grad_(), dy, residual)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Weight and bias by their last name, whatever wraps the norm."""
    return {name.rsplit(".", 1)[-1]: p for name, p in module.named_parameters()}


def prepare(module: nn.Module, device: str) -> nn.Module:
    """Moves the module and gives it the same weights as any other module of its width.

    The values are multiples of 1/64 near one: exact in every dtype, so rounding parameters to half
    precision, as torch's group norm asks for, does not change the problem.
    """
    module.to(device).train()
    with torch.no_grad():
        for name, parameter in parameters(module).items():
            steps = torch.arange(parameter.numel(), device=device) * 7 % 64 - 32
            parameter.copy_(steps / 64 + (1 if name == "weight" else 0))
    return module


def leaves(module: nn.Module, operands: Operands) -> dict[str, Tensor]:
    """Everything a training step asks the gradient of, under the gradient's name."""
    named = {"dx": operands.x}
    if operands.residual is not None:
        named["dresidual"] = operands.residual
    return named | {f"d{name}": p for name, p in parameters(module).items()}


def call(module: nn.Module, operands: Operands, direction: str) -> Callable[[], object]:
    """The timed thing. It returns what it computed, so that a caller can keep the memory alive."""
    wanted = tuple(leaves(module, operands).values())

    def forward() -> Tensor:
        y: Tensor = module(operands.x, operands.residual)
        return y

    if direction == "forward":
        return forward
    if direction == "both":
        return lambda: torch.autograd.grad(forward(), wanted, operands.dy)
    # The one forward is outside what is timed; its graph serves every repetition.
    y = forward()
    return lambda: torch.autograd.grad(y, wanted, operands.dy, retain_graph=True)

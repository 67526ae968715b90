"""The random tensors of a case, and the calls that are checked and timed on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import papers
from .registry import DTYPES, Case


@dataclass
class Operands:
    """Inputs of one call: x, the gradient of y, and what the case's method needs beside x.

    `extras` may hold anything: index tensors, a style, the convolution that x came from.
    """

    x: Tensor
    dy: Tensor
    residual: Tensor | None = None
    extras: tuple[Any, ...] = ()

    def arguments(self) -> tuple[Any, ...]:
        rest = () if self.residual is None else (self.residual,)
        return (self.x, *self.extras, *rest)

    def exact(self, case: Case) -> Operands:
        """The same values in float64."""
        x, extras = papers.exact(case, self.x, self.extras)
        residual = self.residual
        wide = None if residual is None else residual.detach().double().requires_grad_()
        return Operands(x, self.dy.double(), wide, extras)


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
    x, extras = papers.extras(case, x.requires_grad_())
    return Operands(x, dy, rest[0].requires_grad_() if rest else None, extras)


def last_names(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by their last name, whatever wraps the norm; a name that recurs is numbered."""
    found: dict[str, Tensor] = {}
    for name, tensor in pairs:
        short = name.rsplit(".", 1)[-1]
        count = sum(known.split("#")[0] == short for known in found)
        found[f"{short}#{count + 1}" if count else short] = tensor
    return found


def prepare(module: nn.Module, device: str) -> nn.Module:
    """Moves the module and gives it the same weights as any other module of its kind.

    The values are multiples of 1/64 near one or zero: exact in every dtype, so rounding parameters
    to half precision, as torch's group norm asks for, does not change the problem.
    """
    module.to(device).train()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            steps = torch.arange(parameter.numel(), device=device) * 7 % 64 - 32
            centre = 1 if name.rsplit(".", 1)[-1] == "weight" else 0
            parameter.copy_((steps / 64 + centre).view(parameter.shape))
    return module


def settle(module: nn.Module, history: Iterable[Operands]) -> nn.Module:
    """Training calls that fill the module's memory of past batches, if it has one."""
    for past in history:
        module(*past.arguments())
    return module


def leaves(module: nn.Module, operands: Operands) -> dict[str, Tensor]:
    """Everything a training step asks the gradient of, under the gradient's name."""
    named = {"dx": operands.x}
    if operands.residual is not None:
        named["dresidual"] = operands.residual
    parameters = last_names(module.named_parameters())
    return named | {f"d{name}": p for name, p in parameters.items()}


def call(module: nn.Module, operands: Operands, direction: str) -> Callable[[], object]:
    """The timed thing. It returns what it computed, so that a caller can keep the memory alive."""
    wanted, arguments = tuple(leaves(module, operands).values()), operands.arguments()

    def forward() -> Tensor:
        y: Tensor = module(*arguments)
        return y

    def gradients(y: Tensor, retain: bool) -> object:
        return torch.autograd.grad(
            y, wanted, operands.dy, retain_graph=retain, materialize_grads=True
        )

    if direction == "forward":
        return forward
    if direction == "both":
        return lambda: gradients(forward(), False)
    # The one forward is outside what is timed; its graph serves every repetition.
    y = forward()
    return lambda: gradients(y, True)

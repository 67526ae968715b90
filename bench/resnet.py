"""ResNet-50 in plain torch, its norms made by a factory: the network of the end-to-end rows.

torchvision's structure and initialization (v1.5: the stride is in the 3x3 convolution; the last
norm of a block starts at one), so a BatchNorm factory gives its parameters and its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

# norm(channels, act, residual): a module called as ``norm(y, residual)`` that ends in `act`;
# ``residual`` tells whether it will get one, to be added before the activation.
Factory = Callable[[int, "str | None", bool], nn.Module]
PARAMETERS = 25_557_032
DEPTHS = (3, 4, 6, 3)


class Unfused(nn.Module):
    """A norm without residual and activation, then both as torchvision has them, in place.

    A norm that is called with more than y, as ``norm(y, conv_input, conv)``, sets ``wants_conv``.
    """

    def __init__(self, norm: nn.Module, act: str | None) -> None:
        super().__init__()
        if act not in (None, "relu"):
            raise ValueError(f"act: expected None or 'relu', got {act!r}")
        self.norm, self.act = norm, act
        self.wants_conv = bool(getattr(norm, "wants_conv", False))

    def forward(self, y: Tensor, *rest: Any) -> Tensor:
        extras, residual = (rest[:2], rest[2:]) if self.wants_conv else ((), rest)
        z: Tensor = self.norm(y, *extras)
        if residual:
            z += residual[0]
        return z if self.act is None else F.relu(z, inplace=True)


def bare(norm: nn.Module) -> Any:
    """The norm itself, whatever stands around it."""
    return norm.norm if isinstance(norm, Unfused) else norm


class ConvNorm(nn.Module):
    """A convolution without bias, its norm, and what the norm ends with."""

    def __init__(
        self, norm: Factory, inputs: int, outputs: int, size: int, stride: int = 1,
        act: str | None = "relu", residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = skip_init(
            nn.Conv2d, inputs, outputs, size, stride=stride, padding=size // 2, bias=False
        )
        self.norm = norm(outputs, act, residual)

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        y = self.conv(x)
        extras = (x, self.conv) if getattr(self.norm, "wants_conv", False) else ()
        z: Tensor = self.norm(y, *extras, *residual)
        return z


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with four times the width, and the way around them."""

    def __init__(self, norm: Factory, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.one = ConvNorm(norm, inputs, width, 1)
        self.two = ConvNorm(norm, width, width, 3, stride)
        self.three = ConvNorm(norm, width, outputs, 1, residual=True)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = ConvNorm(norm, inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.three(self.two(self.one(x)), self.around(x))
        return z


class ResNet50(nn.Module):
    """Images (N, 3, H, W) to 1000 logits; `weights` as another one's `weights()` has them."""

    def __init__(self, norm: Factory, weights: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.stem = ConvNorm(norm, 3, 64, 7, 2)
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, depth in enumerate(DEPTHS):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(norm, inputs, 64 * 2**stage, stride))
                inputs = 256 * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = skip_init(nn.Linear, inputs, 1000)
        with torch.no_grad():
            if weights is None:
                self.reset_parameters()
            else:
                for mine, given in zip(self.weights(), weights, strict=True):
                    mine.copy_(given)

    def reset_parameters(self) -> None:
        """Convolutions and head; norms come initialized."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.head.reset_parameters()

    def weights(self) -> Iterator[Tensor]:
        """Of every convolution and the head: all that does not belong to a norm."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                yield from module.parameters(recurse=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(images), 3, stride=2, padding=1)
        x = F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1)
        logits: Tensor = self.head(x)
        return logits


def eval_affine(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Mean, variance, weight, bias, each (C,), and eps of a norm that is affine in evaluation.

    Raises:
        ValueError: if its statistics depend on the input, or are not one a channel or more.
    """
    statistics = getattr(norm, "eval_statistics", None)
    mean, var = statistics() if statistics else (
        getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    )  # fmt: skip
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    gated = hasattr(norm, "weight_readjust") or hasattr(norm, "weight_proxy")
    if mean is None or var is None or weight is None or bias is None or gated:
        raise ValueError(f"{type(norm).__name__} is not affine in evaluation")
    repeat, rest = divmod(len(weight), len(mean))
    if rest:
        raise ValueError(f"{type(norm).__name__}: {len(mean)} groups cut {len(weight)} channels")
    mean, var = (each.repeat_interleave(repeat) for each in (mean, var))
    return mean, var, weight, bias, float(getattr(norm, "eps", 0.0))


def fold(model: ResNet50) -> ResNet50:
    """Puts every norm into its convolution, in place, and returns the model, in evaluation."""
    model.eval()
    for layer in model.modules():
        if not isinstance(layer, ConvNorm):
            continue
        norm: Any = layer.norm
        mean, var, weight, bias, eps = eval_affine(bare(norm))
        layer.conv.weight, layer.conv.bias = nn.utils.fusion.fuse_conv_bn_weights(
            layer.conv.weight, None, mean, var, eps, weight, bias
        )
        layer.norm = Unfused(nn.Identity(), norm.act)
    return model

"""Host-side cost of a call: arguments, dispatch and autograd around a tensor that costs nothing.

``pytest bench/ --benchmark-only``, with ``--benchmark-autosave`` and ``--benchmark-compare`` for a
history. Each of ours stands in one group with PyTorch's own layer.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fusednorm

CHANNELS = 8
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nn.BatchNorm2d": lambda: nn.BatchNorm2d(CHANNELS),
    "BatchNorm": lambda: fusednorm.BatchNorm(CHANNELS),
    "BatchGroupNorm": lambda: fusednorm.BatchGroupNorm(CHANNELS, 2),
    "nn.GroupNorm": lambda: nn.GroupNorm(2, CHANNELS),
    "GroupNorm": lambda: fusednorm.GroupNorm(CHANNELS, 2),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DEVICES)
def x(request):
    return torch.randn(2, CHANNELS, 4, 4, device=request.param, requires_grad=True)


@pytest.fixture(params=LAYERS)
def layer(request, x):
    return LAYERS[request.param]().to(x.device)


def test_evaluation(benchmark, layer, x):
    benchmark.group = f"evaluation, {x.device.type}"
    with torch.no_grad():
        y = benchmark(layer.eval(), x)
    assert y.isfinite().all()


def test_forward(benchmark, layer, x):
    benchmark.group = f"forward, {x.device.type}"
    y = benchmark(layer, x)
    assert y.requires_grad


def test_forward_backward(benchmark, layer, x):
    benchmark.group = f"forward + backward, {x.device.type}"
    wanted, dy = [x, *layer.parameters()], torch.randn_like(x)
    gradients = benchmark(lambda: torch.autograd.grad(layer(x), wanted, dy))
    assert all(gradient.isfinite().all() for gradient in gradients)

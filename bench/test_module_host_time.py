"""Host time of a training call of the modules with a null launch, beside nn.BatchNorm2d's call.

``pytest bench/test_module_host_time.py --benchmark-only``. The compiled operators check, plan for
an H200, allocate and launch nothing; nn.BatchNorm2d runs the same tiny CPU tensor through ATen. The
ratio of both, which tests/test_host_time.py holds to at most 1, stands in ``extra_info``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fusednorm
from fusednorm.ops.backend import null_launch
from fusednorm.ops.schema import NATIVE_MISSING

CHANNELS = 8
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nn.BatchNorm2d": lambda: nn.BatchNorm2d(CHANNELS),
    "BatchNorm": lambda: fusednorm.BatchNorm(CHANNELS),
    "BatchNorm, relu": lambda: fusednorm.BatchNorm(CHANNELS, act="relu"),
    "BatchGroupNorm": lambda: fusednorm.BatchGroupNorm(CHANNELS, 2),
    "GroupNorm": lambda: fusednorm.GroupNorm(CHANNELS, 2),
}

pytestmark = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with null_launch():
        yield
    torch.set_num_threads(before)


def median_us(call: Callable[[], object], rounds: int = 100, calls: int = 20) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - began) / calls * 1e6)
    return statistics.median(found)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_training_forward(benchmark, name, requires_grad):
    benchmark.group = f"training forward, null launch, requires_grad={requires_grad}"
    layer, peer = LAYERS[name](), LAYERS["nn.BatchNorm2d"]()
    x = torch.randn(2, CHANNELS, 4, 4, requires_grad=requires_grad)
    assert benchmark(layer, x).shape == x.shape
    # Interleaved by the half: whatever else the machine does falls on both.
    ours, theirs, again = (median_us(lambda m=m: m(x)) for m in (layer, peer, layer))
    benchmark.extra_info["ratio to nn.BatchNorm2d"] = round((ours + again) / 2 / theirs, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_backward(benchmark, name):
    benchmark.group = "forward + backward, null launch"
    layer = LAYERS[name]()
    x, dy = torch.randn(2, 2, CHANNELS, 4, 4).unbind()
    wanted = [x.requires_grad_(), *layer.parameters()]
    gradients = benchmark(lambda: torch.autograd.grad(layer(x), wanted, dy))
    assert [g.shape for g in gradients] == [w.shape for w in wanted]

"""Host-side costs for pytest-benchmark, each in one group with its peer, and their gate.

``pytest bench/`` shows the times and holds the ceilings; ``--benchmark-only`` leaves the gate out,
``--benchmark-autosave`` and ``--benchmark-compare`` keep a history. With a CUDA device, the module
calls are timed on its tensors as well.
"""

from __future__ import annotations

import pytest
import torch
from fusednorm.bench.host_costs import CEILINGS, PAIRS, breach, within
from torch import nn

import fusednorm


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(max_time=0.3, min_rounds=20)
@pytest.mark.parametrize("who", ["ours", "peer"])
@pytest.mark.parametrize("name", PAIRS)
def test_cost(benchmark, name, who):
    benchmark.group = name
    call = PAIRS[name]()[who == "peer"]
    benchmark.extra_info["ceiling"] = CEILINGS[name]
    with within(name):
        assert benchmark(call) is not None


@pytest.mark.parametrize("name", PAIRS)
def test_gate(name):
    assert breach(name, PAIRS[name], CEILINGS[name]) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times launches on a CUDA device")
@pytest.mark.parametrize("build", [fusednorm.BatchNorm, nn.BatchNorm2d], ids=["fusednorm", "torch"])
@pytest.mark.parametrize("what", ["forward", "both", "evaluation"])
def test_cuda_call(benchmark, what, build):
    """Launches queue up, so this is the host alone until the queue is full."""
    benchmark.group = f"CUDA {what}"
    module = build(8, device="cuda")
    x = torch.randn(2, 8, 4, 4, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    if what == "evaluation":
        with torch.no_grad():
            benchmark(module.eval(), x)
    elif what == "forward":
        benchmark(module, x)
    else:
        wanted = [x, *module.parameters()]
        benchmark(lambda: torch.autograd.grad(module(x), wanted, dy))
    torch.cuda.synchronize()

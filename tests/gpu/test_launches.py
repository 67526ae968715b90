"""Launches of the compiled library that share a card: streams, graphs, counters that run out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fusednorm
import fusednorm.functional as FF
from cases import in_layout
from fusednorm import BatchGroupNorm, BatchNorm, GroupNorm, explain

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled(poisoned: None) -> Iterator[None]:
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA device; CPU rungs live in tests/"
    torch.use_deterministic_algorithms(False)  # filling fresh memory is not what is captured here
    with fusednorm.backend("cuda"):
        yield


# Streaming with a fold, on-chip with a barrier of the grid, and clusters: see their plans.
LAYERS = {
    "columns": ((64, 64, 56, 56), "nhwc", BatchNorm(64)),
    "runs": ((64, 64, 56, 56), "nchw", BatchGroupNorm(64, 2)),
    "inside": ((16, 64, 28, 28), "nhwc", BatchGroupNorm(64, 128)),
    "samples": ((16, 64, 28, 28), "nhwc", GroupNorm(64, 8)),
    "frames": ((64, 512, 7, 7), "nchw", BatchNorm(512)),
}


def layer(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    shape, layout, norm = LAYERS[name]
    x = in_layout(torch.randn(shape), layout).cuda().bfloat16()
    return norm.cuda(), in_layout(x, layout).requires_grad_()


def step(norm: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = norm(x)
    return [y, *torch.autograd.grad(y, [x, *norm.parameters()], torch.ones_like(y))]


def kernels(call) -> list[str]:
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [e.name for e in profile.events() if e.device_type == cuda]


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_are_those_planned(name: str) -> None:
    """No memset, nothing for the running statistics, nothing that ``explain`` does not say."""
    norm, x = layer(name)
    dy = torch.ones_like(x)
    planned = sum(launch.nodes for launch in explain(norm, x).launches)
    ran = kernels(lambda: torch.autograd.grad(norm(x), [x, *norm.parameters()], dy))
    assert len(ran) == planned, ran


@pytest.mark.parametrize("name", LAYERS)
def test_streams_do_not_meet(name: str) -> None:
    """The same layer in eight streams at once, bitwise equal to one after the other."""
    norm, x = layer(name)
    expected = step(norm, x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(norm, x))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(got, want) for got, want in zip(result, expected, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_replays_beside_its_stream(name: str) -> None:
    norm, x = layer(name)
    expected = step(norm, x)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = step(norm, x)
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(side):
            graph.replay()
        eager = step(norm, x)
    torch.cuda.synchronize()
    for got, beside, want in zip(captured, eager, expected, strict=True):
        assert torch.equal(got, want) and torch.equal(beside, want)


def test_counters_run_out_and_nothing_breaks() -> None:
    """More captures than there are counters: later ones take one more kernel, the same results."""
    x = in_layout(torch.randn(64, 64, 28, 28), "nhwc").cuda()
    expected = FF.group_norm(x, 64)
    graphs = []
    for _ in range(400):  # of 4096 cells each
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = FF.group_norm(x, 64)
        graphs.append((graph, y))
    for graph, y in graphs[:2] + graphs[-2:]:
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(FF.group_norm(x, 64), expected, rtol=0, atol=0)


def test_more_streams_than_shares() -> None:
    x = torch.randn(64, 64, 28, 28, device="cuda")
    expected = FF.batch_norm(x, None, None, training=True)
    # torch's pools: 32 streams of either priority.
    pool = [torch.cuda.Stream(priority=p) for p in (0, -1) for _ in range(32)]
    for stream in pool:
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            y = FF.batch_norm(x, None, None, training=True)
        stream.synchronize()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_in_the_same_launch(momentum: float | None) -> None:
    ours = BatchNorm(64, momentum=momentum).cuda()
    theirs = torch.nn.BatchNorm2d(64, momentum=momentum).cuda()
    for shape in ((2, 64, 7, 7), (64, 64, 56, 56)):
        x = torch.randn(shape, device="cuda") + 3
        for _ in range(3):
            ours(x), theirs(x)
        for got, want in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

"""Rung 7: what only a card can show. The rest of tests/ runs there again with real backends."""

from __future__ import annotations

import threading

import pytest
import torch
from fusednorm.bench import observe

import fusednorm
import fusednorm.functional as FF
from cases import Case, check, in_layout, make
from fusednorm import BatchGroupNorm, BatchNorm, GroupNorm
from fusednorm.ops import Normalize

pytestmark = pytest.mark.gpu
BACKENDS = ("cuda", "triton")


@pytest.fixture(autouse=True)
def card() -> None:
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA device; CPU rungs live in tests/"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with fusednorm.backend(request.param):
        yield request.param


def test_both_kernel_backends_are_here() -> None:
    assert fusednorm.available_backends() == ("cuda", "triton", "reference")


def forward_backward(case: Case, backend: str) -> list[torch.Tensor]:
    i = make(case, "cuda")
    leaves = [t.requires_grad_() for t in i.tensors() if t is not None]
    y, mean, _, var, _ = Normalize.apply(*i.tensors(), case.config(backend))
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, i.dy)]


# Full-size layers: many splits, both vector widths, every kind of group. SiLU, because a kink as
# ReLU's would turn a rounding of z, somewhere among millions, into an error of the size of dy.
LARGE = [
    Case((n, c, h, h), g, per_sample, layout, dtype, "silu", residual=True)
    for n, c, h, g, per_sample in (
        (32, 64, 56, 64, False),
        (8, 256, 14, 8, False),
        (4, 512, 7, 512, False),
        (4, 64, 28, 128, False),
        (2, 48, 28, 49, False),
        (4, 65, 17, 65, False),
        (8, 128, 28, 32, True),
    )
    for layout in ("nchw", "nhwc")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_full_size_layers_against_float64(case: Case, backend: str) -> None:
    y, mean, var, dx, dweight, dbias, dresidual = forward_backward(case, backend)
    got = {"y": y, "mean": mean, "var": var, "dx": dx}
    got |= {"dweight": dweight, "dbias": dbias, "dresidual": dresidual}
    check(case, got, make(case))


@pytest.mark.parametrize("case", LARGE[::3], ids=str)
def test_bitwise_repeats(case: Case, backend: str) -> None:
    first = forward_backward(case, backend)
    for _ in range(20):
        again = forward_backward(case, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("make_norm", [BatchNorm, lambda c: BatchGroupNorm(c, 8)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_cuda_graph_replays_a_training_step(
    make_norm, momentum: float | None, backend: str
) -> None:
    """Captured without a host synchronisation; running statistics advance with every replay."""
    torch.use_deterministic_algorithms(False)  # filling fresh memory is not what is captured here
    norm, eager = make_norm(64).cuda(), make_norm(64).cuda()
    norm.momentum = eager.momentum = momentum
    x = torch.randn(8, 64, 14, 14, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            norm(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    norm.reset_running_stats()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = norm(x)
        y.square().sum().backward()
    norm.reset_running_stats()
    for _ in range(4):
        data = torch.randn_like(x)
        with torch.no_grad():
            x.copy_(data)
        x.grad.zero_()
        graph.replay()
        twin = data.clone().requires_grad_()
        expected = eager(twin)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=0)
    torch.testing.assert_close(norm.running_var, eager.running_var, rtol=0, atol=0)
    assert norm.num_batches_tracked == 4


def test_counters_last_for_many_long_graphs() -> None:
    """A benchmark captures thousands of calls; without counters each would take a kernel more."""
    norm = BatchNorm(2048, device="cuda", dtype=torch.float64)
    x = torch.randn(2, 2048, 7, 7, device="cuda", dtype=torch.float64)

    def calls() -> None:
        for _ in range(512):
            norm(x)

    with fusednorm.backend("cuda"), torch.cuda.stream(torch.cuda.Stream()):
        found = [observe.graph_nodes(calls) for _ in range(4)]
    assert found[0] is not None
    assert len(set(found)) == 1, found


def test_no_host_synchronisation(backend: str) -> None:
    norms = [BatchNorm(64, momentum=None), BatchGroupNorm(64, 8), GroupNorm(64, 8)]
    x = torch.randn(4, 64, 14, 14, device="cuda", requires_grad=True)
    norms = [n.cuda() for n in norms]
    torch.use_deterministic_algorithms(False)
    for n in norms:
        n(x).sum().backward()  # Triton compiles in the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in norms:
            n(x).sum().backward()
            n.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_a_call(backend: str) -> None:
    """Forward and backward are two kernels each at most: no memset, no combine of its own."""
    torch.use_deterministic_algorithms(False)
    x = torch.randn(8, 64, 28, 28, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w, b = (torch.ones(64, device="cuda", requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)

    def step() -> None:
        y = FF.batch_norm(x, None, None, w, b, True, act="relu")
        torch.autograd.grad(y, (x, w, b), dy)

    step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 2 <= len(names) <= 4, names


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_more_than_2_31_elements(layout: str, backend: str) -> None:
    """Offsets are 64 bit: the last sample of a tensor just above 2^31 elements is right."""
    torch.use_deterministic_algorithms(False)
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("rung dropped: needs 24 GiB of free device memory")
    x = torch.empty(2**15 + 1, 64, 32, 32, device="cuda", dtype=torch.bfloat16)
    if layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    x.normal_()
    x[-1] += 3
    y = FF.batch_norm(x, None, None, None, None, True)
    mean = torch.stack([x[:, c].float().mean() for c in range(4)]).view(1, -1, 1, 1)
    var = torch.stack([x[:, c].float().var() for c in range(4)]).view(1, -1, 1, 1)
    expected = (x[-1:, :4].float() - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(y[-1:, :4].float(), expected, rtol=2**-7, atol=2**-7)


def test_misaligned_views(backend: str) -> None:
    """A storage offset that breaks 16-byte alignment takes the scalar path, not a fault."""
    for offset in (1, 2, 3):
        case = Case((4, 8, 16, 16), 8, dtype=torch.bfloat16)
        i = make(case, "cuda")
        buffer = torch.empty(i.x.numel() + offset, device="cuda", dtype=torch.bfloat16)
        x = buffer[offset:].view(case.shape).copy_(i.x)
        y, mean, _, var, _ = Normalize.apply(x, i.weight, i.bias, None, case.config(backend))
        check(case, {"y": y, "mean": mean, "var": var}, make(case))


def test_two_streams_and_two_threads(backend: str) -> None:
    x = in_layout(torch.randn(16, 64, 56, 56), "nhwc").cuda()
    expected = FF.batch_group_norm(x, 8, training=True)
    results: list[torch.Tensor] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(50):
                y = FF.batch_group_norm(x, 8, training=True)
        stream.synchronize()
        results.append(y)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 2 and all(torch.equal(y, expected) for y in results)


def test_reduce_overhead_mode(backend: str) -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    norm = BatchGroupNorm(64, 8, act="relu").cuda()
    x = torch.randn(8, 64, 14, 14, device="cuda")
    expected = norm(x)
    run = torch.compile(norm, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.sanitizer
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [6, 2, 12, 4])
def test_small_for_the_sanitizer(groups: int, layout: str) -> None:
    """Every sweep and combine of the compiled kernels, small enough for compute-sanitizer."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = Case((3, 6, 5, 4), groups, False, layout, dtype, "silu", residual=True)
        forward_backward(case, "cuda")
    norm = BatchGroupNorm(6, groups).cuda()
    with fusednorm.backend("cuda"):
        norm(in_layout(torch.randn(3, 6, 5, 4), layout).cuda())
    torch.cuda.synchronize()

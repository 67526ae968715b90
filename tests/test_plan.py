"""Launch plans, for problems and devices of any size, without a card.

What a plan promises is checked in C++ (csrc/host/plan_checks.h): limits of the device, every
element visited once, counters, bytes. Here hypothesis draws thousands of problems for it, a loop of
its own millions, and the plans for an H200 are held to what its memory allows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import host_ops
from host_strategies import DEVICES, Problem, devices, problems

host = host_ops.load()
H200 = host.Device()
RELU, SILU = host_ops.ACTIVATIONS.index("relu"), host_ops.ACTIVATIONS.index("silu")

# (channels, side of the image) of the batch norms of a ResNet-50.
RESNET = [
    *[(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)],
    *[(256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)],
]
BATCHES = (2, 8, 32, 128, 256)


def problem_of(
    samples: int,
    channels: int,
    spatial: int,
    groups: int | None = None,
    per_sample: bool = False,
    **options: Any,
) -> Any:
    geometry = host.Geometry(samples, channels, spatial, groups or channels, per_sample)
    return host.Problem(geometry, **options)


def on_chip(plan: Any) -> bool:
    return bool(plan.path == host.Path.on_chip)


PATTERNS = [f"{name} {width}" for name in ("runs", "columns", "frames") for width in ("vector",)]
KINDS = [
    *["runs scalar", "columns scalar", "beyond 32 bits", *PATTERNS],
    *[f"{pattern} {tier}" for pattern in PATTERNS for tier in ("block", "cluster", "grid")],
]


# A million problems with three plans each take half a minute; elements are solved for in fewer.
@pytest.mark.parametrize(
    ("seed", "count", "depth", "least"),
    [*((seed, 250_000, 0, 700) for seed in range(4)), (0, 2500, 1, 2)],
)
def test_promises_over_many_problems(seed: int, count: int, depth: int, least: int) -> None:
    seen = host.check_plans(seed=seed, count=count, depth=depth)
    few = {kind: seen.get(kind, 0) for kind in KINDS if seen.get(kind, 0) < least}
    assert not few, "the draw hardly meets these"


@st.composite
def planned(draw: st.DrawFn, sizes: st.SearchStrategy[Problem]) -> tuple[Any, Any]:
    p = draw(sizes)
    # Two of the geometry's products must fit 64 bits; no tensor that fits a device comes near.
    size = p.channels * p.spatial
    assume(size * (p.spatial + size // p.groups) < 1 << 62)
    act = draw(st.integers(0, len(host_ops.ACTIVATIONS) - 1))
    direction = draw(st.sampled_from(["forward", "backward", "apply"]))
    residual = draw(st.booleans())
    masked = residual and act == RELU and draw(st.booleans())
    backward = direction == "backward"
    problem = problem_of(
        p.samples,
        p.channels,
        p.spatial,
        p.groups,
        p.per_sample,
        element_size=draw(st.sampled_from([2, 4, 8])),
        channels_last=draw(st.booleans()),
        aligned=draw(st.booleans()),
        direction=direction,
        # The backward reads the mask in place of the residual, and neither without an activation.
        residual=residual and not (backward and (masked or act == 0)),
        mask=masked,
        dresidual=backward and residual and act != 0,
        act=act,
    )
    return problem, host.Device(**draw(devices))


@pytest.mark.parametrize("path", ["plan_streaming", "plan_on_chip", "make_plan"])
@given(
    case=st.one_of(planned(problems(24, 8)), planned(problems(1 << 12, 512))),
    seed=st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_promises(path: str, case: tuple[Any, Any], seed: int) -> None:
    problem, device = case
    host.check_plan(problem, device, getattr(host, path)(problem, device), depth=3, seed=seed)


@given(case=planned(problems(1 << 20, 1 << 16)), seed=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_promises_beyond_32_bits(case: tuple[Any, Any], seed: int) -> None:
    problem, device = case
    numel = problem.geometry.pooled * problem.geometry.sets * problem.geometry.size
    assume(1 << 31 < numel < 1 << 38)
    host.check_plan(problem, device, host.make_plan(problem, device), depth=2, seed=seed)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("samples", BATCHES)
@pytest.mark.parametrize(("channels", "side"), RESNET)
def test_resnet_50_is_read_once_where_it_fits(
    channels: int, side: int, samples: int, element_size: int, channels_last: bool
) -> None:
    """A slice is a channel in NCHW, and all of an H200 together holds any of these. In NHWC it is
    64 bytes of every position, below which DRAM reads more than it is asked for."""
    spatial = side * side
    tensor = samples * channels * spatial * element_size
    for direction, tensors in (("forward", 1), ("backward", 2)):
        problem = problem_of(
            samples,
            channels,
            spatial,
            element_size=element_size,
            channels_last=channels_last,
            direction=direction,
            act=RELU,
        )
        plan = host.make_plan(problem, H200)
        slice_bytes = samples * spatial * 64 * tensors
        fits = not channels_last or slice_bytes <= H200.num_sms * H200.shared_per_block
        assert on_chip(plan) == fits
        assert plan.nodes == (1 if fits else 2)
        assert plan.vector * element_size == 16
        assert host.planned_bytes(problem, plan) == (1 + tensors if fits else 1 + 2 * tensors) * (
            tensor
        )


def test_resnet_50_streams_14_nhwc_layers_and_batches() -> None:
    """The list behind the rule above, counted by hand."""
    streaming = {
        (side, samples, direction)
        for channels, side in RESNET
        for samples in BATCHES
        for direction in ("forward", "backward")
        if not on_chip(
            host.make_plan(
                problem_of(
                    samples,
                    channels,
                    side * side,
                    element_size=2,
                    channels_last=True,
                    direction=direction,
                ),
                H200,
            )
        )
    }
    assert streaming == {
        *[(112, 128, "forward"), (112, 256, "forward"), (56, 256, "forward")],
        *[(112, n, "backward") for n in (32, 128, 256)],
        *[(56, n, "backward") for n in (128, 256)],
    }


# Tensors read and written: (direction, options, streaming, on the chip), and masks, 1/16 each.
FLOOR = [
    ("forward", {}, (3, 0), (2, 0)),
    ("forward", {"act": SILU}, (3, 0), (2, 0)),
    ("forward", {"act": RELU, "residual": True}, (4, 0), (3, 0)),
    ("forward", {"act": RELU, "residual": True, "mask": True}, (4, 1), (3, 1)),
    ("apply", {"act": RELU}, (2, 0), None),
    ("apply", {"act": RELU, "residual": True}, (3, 0), None),
    ("backward", {}, (5, 0), (3, 0)),
    ("backward", {"act": SILU}, (5, 0), (3, 0)),
    ("backward", {"act": RELU, "mask": True, "dresidual": True}, (6, 2), (4, 1)),
    ("backward", {"act": SILU, "residual": True, "dresidual": True}, (8, 0), (5, 0)),
]


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("direction", "options", "streaming", "chip"), FLOOR)
def test_floor_of_bytes(
    direction: str,
    options: dict[str, Any],
    streaming: tuple[int, int],
    chip: tuple[int, int] | None,
    element_size: int,
) -> None:
    problem = problem_of(
        32, 256, 784, element_size=element_size, channels_last=False, direction=direction, **options
    )
    tensor = 32 * 256 * 784 * element_size
    for make, counts in ((host.plan_streaming, streaming), (host.plan_on_chip, chip)):
        plan = make(problem, H200)
        assert on_chip(plan) == (make is host.plan_on_chip and chip is not None)
        tensors, masks = counts or streaming
        assert host.planned_bytes(problem, plan) == tensors * tensor + masks * tensor // 16


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("channels", "side"), RESNET[1:])
def test_a_group_of_a_sample_fits_an_sm_or_a_cluster(
    channels: int, side: int, direction: str, element_size: int
) -> None:
    problem = problem_of(
        32,
        channels,
        side * side,
        32,
        per_sample=True,
        element_size=element_size,
        channels_last=False,
        direction=direction,
    )
    plan = host.make_plan(problem, H200)
    assert on_chip(plan)
    assert plan.tier in (host.Tier.block, host.Tier.cluster)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("channels", "side"), RESNET)
def test_streaming_fills_the_card(
    channels: int, side: int, channels_last: bool, direction: str
) -> None:
    """64 channels like 2048: whole waves of resident blocks, 24 KB an SM in flight."""
    problem = problem_of(
        256,
        channels,
        side * side,
        element_size=2,
        channels_last=channels_last,
        direction=direction,
    )
    plan = host.plan_streaming(problem, H200)
    resident = H200.num_sms * plan.ctas_per_sm
    waves = math.ceil(plan.grid / resident)
    assert plan.grid / (waves * resident) > 0.85
    assert plan.ctas_per_sm * plan.block * 16 * 4 >= 24 << 10
    # Rows left over at the end of the last share keep its block waiting.
    assert plan.rows_of_tile / plan.splits >= 8 or plan.splits == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", [name for name in DEVICES if name != "h200"])
def test_lesser_devices(name: str, direction: str) -> None:
    """No cluster before sm_90, no spinning without cooperation."""
    device = host.Device(**DEVICES[name])
    tiers = set()
    for samples in BATCHES:
        for channels, side in RESNET:
            for channels_last in (False, True):
                problem = problem_of(
                    samples,
                    channels,
                    side * side,
                    element_size=2,
                    channels_last=channels_last,
                    direction=direction,
                )
                plan = host.plan_on_chip(problem, device)
                tiers.add(plan.tier if on_chip(plan) else None)
    if device.max_cluster == 1:
        assert host.Tier.cluster not in tiers
    if not device.cooperative:
        assert host.Tier.grid not in tiers
    assert name == "tiny" or host.Tier.block in tiers


# Launches counted: what a plan says against what runs.
SHAPES = {
    "frames": ((4, 6, 7, 4), False),
    "runs": ((2, 2, 24, 24), False),
    "columns": ((3, 16, 2, 3), True),
    "scalar": ((3, 5, 3, 3), False),
}
SMALL = {"num_sms": 4, "shared_per_block": 8192, "shared_per_sm": 9216, "max_cluster": 4}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", ["streaming", "on_chip"])
def test_nodes_are_launches(path: str, shape: str, per_sample: bool) -> None:
    sizes, channels_last = SHAPES[shape]
    x = host_ops.place(torch.randn(sizes), channels_last)
    kernels = host_ops.Kernels(host, device=SMALL, path=path)
    residual = host_ops.place(torch.randn(sizes), channels_last)
    groups = 1 if per_sample else sizes[1]

    def launched(before: int) -> int:
        return int(host.launches()) - before

    for act, other in (("none", None), ("relu", residual)):
        before = host.launches()
        _, mean, rstd, _, _ = kernels.forward(
            x, None, None, other, groups, per_sample, 1e-5, act, 0.0
        )
        assert launched(before) == kernels.plan.nodes
        before = host.launches()
        kernels.apply(x, mean, rstd, None, None, other, groups, per_sample, act, 0.0)
        assert launched(before) == kernels.plan.nodes == 1
        before = host.launches()
        kernels.backward(x, x, mean, rstd, None, None, other, groups, per_sample, 1.0, act, 0.0)
        assert launched(before) == kernels.plan.nodes
    if path == "on_chip" and shape != "scalar":
        assert on_chip(kernels.plan)


def test_a_mask_that_threads_share_costs_a_launch() -> None:
    """Scalar kernels leave the mask to a kernel of its own, and the plan says so."""
    x = torch.randn(3, 5, 3, 3)
    kernels = host_ops.Kernels(host)
    before = host.launches()
    kernels.forward(x, None, None, x, 5, False, 1e-5, "relu", 0.0, save_mask=True)
    assert host.launches() - before == kernels.plan.nodes == 3

"""Every path a plan may take, run on the CPU: on chip by one CTA, a cluster, a cooperative grid;
streaming with the combine folded into the sweep or not; masks and running statistics.

Small pretended devices make tiny tensors need many CTAs. Each case is held to float64 as in
test_host_kernels.py, and to the same bits in every order of threads and blocks; counters are
checked to be zero after every call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import host_ops
from host_ops import Kernels, Running, same_bits
from test_host_kernels import (
    EPS,
    MODULE,
    ORDERS,
    SLOPE,
    Case,
    check,
    exact_forward,
    gradients,
    make_inputs,
    run,
    torch_forward,
)

Device = tuple[tuple[str, int], ...]


def device(shared: int, sms: int, cluster: int, cooperative: bool) -> Device:
    return (
        ("shared_per_block", shared),
        ("shared_per_sm", 2 * shared),
        ("num_sms", sms),
        ("max_cluster", cluster),
        ("cooperative", int(cooperative)),
    )


BLOCK = device(200_000, 4, 1, False)
CLUSTER = device(6144, 8, 8, False)
GRID = device(6144, 6, 1, True)


def on_chip(case: Case, on: Device) -> Case:
    return replace(case, path="on_chip", device=on)


def ran(plan: Any) -> str:
    if plan.path == MODULE.Path.streaming:
        return "streaming"
    tier = str(plan.tier).rsplit(".", 1)[1]
    return f"cluster{plan.cluster}" if tier == "cluster" else tier


# Shapes with vectors in every dtype: each access pattern, closed channels and open ones.
SLICES = [
    Case((4, 16, 7, 7), 16),  # frames: a vector spans channels
    Case((6, 16, 14, 14), 16),
    Case((3, 16, 24), 48),  # groups within a channel
    Case((3, 16, 24), 4),  # several channels a group
    Case((9, 8, 56), 8, channels_last=True),
    Case((5, 24, 6, 6), 24, channels_last=True),  # lanes are no power of two
    Case((5, 64, 6, 6), 16, channels_last=True),
    Case((3, 8, 2, 512), 8),  # runs
    Case((3, 8, 2, 512), 2),  # several runs a cell
    Case((3, 8, 2, 512), 8, per_sample=True),
    Case((5, 64, 6, 6), 16, per_sample=True),
    Case((3, 16, 24), 4, per_sample=True, channels_last=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SLICES, ids=str)
def test_one_block_keeps_a_slice(case: Case, dtype: torch.dtype) -> None:
    forward, backward = check(on_chip(replace(case, dtype=dtype, act="silu"), BLOCK))
    assert ran(forward) == ran(backward) == "block"
    assert forward.nodes == 1
    closed = not case.per_sample and case.groups <= case.shape[1]
    assert backward.nodes == (1 if closed else 2)


# (case in half precision, shared memory, forward, backward): found by the plan itself, and
# asserted so that a change of plan does not quietly leave a tier untested. A grid: no clusters.
TIERS = [
    (Case((9, 16, 128), 16), 6144, "cluster4", "cluster4"),
    (Case((9, 16, 64), 16, channels_last=True), 12288, "cluster4", "cluster8"),
    (Case((9, 16, 64), 16, channels_last=True), 24576, "cluster2", "cluster4"),
    (Case((9, 16, 128), 16, channels_last=True), 24576, "cluster4", "cluster8"),
    (Case((8, 64, 6, 6), 16, channels_last=True), 12288, "cluster8", "cluster8"),
    (Case((9, 16, 128), 4), 12288, "cluster2", "cluster4"),
    (Case((9, 16, 7, 7), 16), 12288, "cluster2", "cluster4"),
    (Case((9, 16, 7, 7), 4), 12288, "cluster2", "cluster4"),
    (Case((3, 16, 512), 4, per_sample=True), 3072, "cluster4", "cluster4"),
    (Case((9, 8, 512), 8), 12288, "cluster2", "cluster8"),
    (Case((9, 8, 512), 2), 24576, "cluster4", "cluster8"),
    (Case((9, 16, 128), 16), 6144, "grid", "grid"),
    (Case((9, 16, 64), 16, channels_last=True), 12288, "grid", "grid"),
    (Case((8, 64, 6, 6), 16, channels_last=True), 12288, "grid", "grid"),
    (Case((9, 16, 128), 4), 12288, "grid", "grid"),
    (Case((9, 16, 7, 7), 16), 12288, "grid", "grid"),
    (Case((3, 16, 512), 4, per_sample=True), 3072, "grid", "grid"),
    (Case((3, 16, 96, 2), 48, channels_last=True), 6144, "grid", "grid"),
    (Case((9, 8, 512), 8), 12288, "grid", "grid"),
]


@pytest.mark.parametrize(("case", "shared", "forward", "backward"), TIERS, ids=str)
def test_a_group_keeps_a_slice(case: Case, shared: int, forward: str, backward: str) -> None:
    grid = forward == "grid"
    on = device(shared, 6 if grid else 8, 1 if grid else 8, grid)
    plans = check(on_chip(replace(case, dtype=torch.float16, act="relu"), on))
    assert [ran(p) for p in plans] == [forward, backward]


def test_a_group_of_several_jobs_a_block() -> None:
    """Half a cell's runs to each CTA, and a cell's last CTA with fewer of them than the others."""
    case = Case((3, 16, 512), 4, per_sample=True, dtype=torch.float16)
    for on in (device(6144, 8, 2, False), device(6144, 6, 1, True)):
        forward, backward = check(on_chip(case, on))
        assert ran(forward) == "block"
        assert forward.jobs_per_cta == 4
        assert ran(backward) in ("cluster2", "grid")
        assert backward.jobs_per_cta == 2


@pytest.mark.parametrize("on", [BLOCK, CLUSTER, GRID], ids=["block", "cluster", "grid"])
@pytest.mark.parametrize("act", ["none", "gelu", "leaky_relu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_residual_and_activation_on_chip(channels_last: bool, act: str, on: Device) -> None:
    case = Case((5, 16, 64), 16, channels_last=channels_last, act=act, residual=True, affine=False)
    forward, _ = check(on_chip(replace(case, dtype=torch.bfloat16), on))
    assert forward.path == MODULE.Path.on_chip


@pytest.mark.parametrize("path", ["streaming", "block", "cluster", "grid"])
@pytest.mark.parametrize("dtype", host_ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 24), (3, 5, 7), (4, 16, 7, 7)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_mask_stands_for_the_residual(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, path: str
) -> None:
    """Written from y, read instead of the residual: the gradients are those of the residual."""
    case = Case(shape, shape[1], dtype=dtype, channels_last=channels_last)
    case = replace(case, act="relu", residual=True, mask=True)
    if path != "streaming":
        case = on_chip(case, {"block": BLOCK, "cluster": CLUSTER, "grid": GRID}[path])
    check(case)


@pytest.mark.parametrize("dtype", host_ops.DTYPES, ids=str)
def test_mask_layout(dtype: torch.dtype) -> None:
    """Bit j of byte i is y[i*W + j] > 0 in memory order, W elements to 16 bytes."""
    case = Case((3, 5, 7), 5, dtype=dtype, act="relu", residual=True, channels_last=True)
    i = make_inputs(case)
    k = Kernels(MODULE)
    y, *_, mask = k.forward(
        i.x, i.weight, i.bias, i.residual, 5, False, EPS, "relu", SLOPE, save_mask=True
    )
    assert mask is not None
    memory = (y.as_strided((y.numel(),), (1,)) > 0).tolist()
    width = 16 // dtype.itemsize
    assert mask.tolist() == [
        sum(bit << j for j, bit in enumerate(memory[start : start + width]))
        for start in range(0, len(memory), width)
    ]


FOLDS = [
    Case((3, 2, 1372), 2, sms=16),  # splits of a run
    Case((3, 6, 700), 2, sms=16),  # of several
    Case((2, 6, 50), 10),  # of groups that straddle channels
    Case((3, 8, 7, 7), 8, sms=16),
    Case((900, 8, 7, 7), 4, sms=16),  # frames in two levels
    Case((3000, 8), 8, sms=64),  # columns in two levels
    Case((3000, 48), 4, sms=64),
    Case((700, 600), 2, sms=64),  # a cell of several tiles
    Case((40, 5, 50), 5, sms=64, channels_last=True),
    Case((9, 6, 7), 6, per_sample=True),
]


@pytest.mark.parametrize("counters", [True, False], ids=["folded", "unfolded"])
@pytest.mark.parametrize("case", FOLDS, ids=str)
def test_combine_inside_and_outside_the_sweep(case: Case, counters: bool) -> None:
    before = MODULE.launches()
    inputs = make_inputs(case)
    plans: list[Any] = []
    run(replace(case, counters=counters), inputs, ORDERS[0], plans=plans)
    launched = MODULE.launches() - before
    # One more kernel a pass without counters, and one for apply.
    more = 0 if counters else sum(plan.counters > 0 for plan in plans)
    assert launched == sum(plan.nodes for plan in plans) + more + 1
    assert all(plan.nodes == 2 for plan in plans)
    check(replace(case, counters=counters))


def test_two_levels_are_used() -> None:
    case = Case((3000, 48), 4, sms=64)
    plans: list[Any] = []
    run(case, make_inputs(case), ORDERS[0], plans=plans)
    assert all(plan.two_levels and plan.fans > 1 for plan in plans)


def test_a_few_blocks_take_all_jobs() -> None:
    """A short grid strides over jobs: blocks arrive for several tiles, one after another."""
    for shape, last in (((3, 4, 1372), False), ((900, 16), False), ((30, 8, 7, 7), False)):
        case = Case(shape, shape[1], channels_last=last, sms=16)
        i = make_inputs(case)
        outs = []
        for grid in (2, 1 << 31):
            k = Kernels(MODULE, "shuffled", 3, device={"num_sms": 16}, max_grid=grid - 1)
            outs.append(k.forward(i.x, None, None, None, shape[1], False, EPS, "none", SLOPE)[:4])
        assert all(same_bits(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("path", ["streaming", "unfolded", "block", "cluster", "grid"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_running_statistics_in_the_kernel(channels_last: bool, path: str) -> None:
    case = Case((9, 16, 128), 16, channels_last=channels_last)
    i = make_inputs(case)
    small = 24576 if channels_last else 4096
    tiers = {"block": BLOCK, "cluster": device(small, 8, 8, False)}
    tiers["grid"] = device(small, 6, 1, True)
    on = tiers.get(path, (("num_sms", 8),))
    start = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    running = Running(start[0].clone(), start[1].clone(), torch.tensor(7), 0.3)
    k = Kernels(
        MODULE,
        "shuffled",
        5,
        device=dict(on),
        path="on_chip" if path in ("block", "cluster", "grid") else "streaming",
        counters=path != "unfolded",
    )
    for _ in range(2):
        k.forward(i.x, i.weight, i.bias, None, 16, False, EPS, "none", SLOPE, running=running)
    assert ran(k.plan).startswith(path if path != "unfolded" else "streaming")
    exact = exact_forward(i, case)
    count = 9 * 128
    for name, ours, want in (
        ("mean", running.mean, exact["mean"]),
        ("var", running.var, exact["var"] * count / (count - 1)),
    ):
        assert ours is not None
        old = start[0 if name == "mean" else 1].double()
        for _ in range(2):
            old = 0.7 * old + 0.3 * want
        # Two updates of three roundings each, of numbers near one.
        assert (ours.double() - old).abs().max() <= 8 * torch.finfo(torch.float32).eps * 3
    assert running.num_batches_tracked is not None
    assert running.num_batches_tracked.item() == 9


@pytest.mark.parametrize("on", [BLOCK, CLUSTER, GRID], ids=["block", "cluster", "grid"])
@pytest.mark.parametrize("shape", [(4, 64, 16), (3, 32, 128), (8, 32, 7, 7)], ids=str)
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_two_passes_at_a_large_mean(shape: tuple[int, ...], mean: float, on: Device) -> None:
    """At mean/sigma = 1e3 and 1e4 in fp32: the mean is the number next to the exact one, the
    variance off by its own roundings only, which do not grow with the mean."""
    case = on_chip(Case(shape, shape[1], affine=False), on)
    inputs = make_inputs(case, mean=mean)
    plans: list[Any] = []
    ours = run(case, inputs, ORDERS[0], plans=plans)
    assert plans[0].path == MODULE.Path.on_chip
    exact, theirs = exact_forward(inputs, case), torch_forward(inputs, case)
    # The nearest number, or the other one of a tie.
    spacing = torch.nextafter(ours["mean"], ours["mean"] + 1) - ours["mean"]
    assert ((ours["mean"].double() - exact["mean"]).abs() <= spacing.double() * 0.5001).all()
    eps = torch.finfo(torch.float32).eps
    assert ((ours["var"].double() - exact["var"]) / exact["var"]).abs().max() <= 8 * eps
    error, torch_error = (
        (t["y"].double() - exact["y"]).square().mean().sqrt().item() for t in (ours, theirs)
    )
    assert error <= torch_error


@pytest.mark.parametrize("on", [BLOCK, CLUSTER, GRID], ids=["block", "cluster", "grid"])
def test_constant_and_nan_channels_on_chip(on: Device) -> None:
    case = on_chip(Case((4, 8, 128), 8, act="silu"), on)
    inputs = make_inputs(case)
    inputs.x[:, 1] = -3e36
    inputs.x[2, 3, 5] = torch.nan
    ours = run(case, inputs, ORDERS[0])
    assert ours["var"][1] == 0
    assert ours["mean"][1] == inputs.x[0, 1, 0]
    broken = [False, False, False, True, False, False, False, False]
    assert ours["mean"].isnan().tolist() == broken
    assert ours["y"].isnan().any(dim=2).any(dim=0).tolist() == broken
    assert ours["dx"].isnan().any(dim=2).any(dim=0).tolist() == broken


@pytest.mark.parametrize("live", [0.0, 0.25])
def test_live_weight_on_chip(live: float) -> None:
    case = on_chip(Case((3, 8, 128), 8), CLUSTER)
    inputs = make_inputs(case)
    ours = run(case, inputs, ORDERS[0], live)

    def exact_live(i: Any, c: Case) -> dict[str, Tensor]:
        return exact_forward(i, c, live)

    exact = gradients(exact_live, inputs, case, torch.float64)["dx"]
    bound = 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours["dx"].double() - exact).abs().max() <= bound

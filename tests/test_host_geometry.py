"""Pieces and launch plans: closed forms against counting, and limits for shapes of any size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import host_ops
from host_strategies import Problem, problems

host = host_ops.load()

ELEMENT_SIZES = st.sampled_from([2, 4, 8])
SMS = st.integers(1, 200)


def geometry(p: Problem) -> Any:
    return host.Geometry(p.samples, p.channels, p.spatial, p.groups, p.per_sample)


@given(problems(24, 3))
def test_pieces_against_counting(p: Problem) -> None:
    size = p.channels * p.spatial
    length = size // p.groups
    keys = [(d // p.spatial, d // length) for d in range(size)]
    # A piece begins wherever the channel or the group changes.
    starts = [d for d in range(size) if d == 0 or keys[d] != keys[d - 1]]
    bounds = [*starts, size]
    piece = [i for i, start in enumerate(starts) for _ in range(start, bounds[i + 1])]
    lengths = {bounds[i + 1] - start for i, start in enumerate(starts)}

    g = geometry(p)
    assert g.size == size
    assert g.group_size == length
    assert g.pieces == len(starts) == p.channels + p.groups - math.gcd(p.channels, p.groups)
    assert g.sets == (p.samples if p.per_sample else 1)
    assert g.cells == g.sets * p.groups
    assert g.count == g.pooled * length == p.samples * size // g.cells
    assert [g.piece_of(d) for d in range(size + 1)] == [*piece, g.pieces]
    assert [g.piece_start(i) for i in range(g.pieces + 1)] == bounds
    assert [g.channel_of(i) for i in range(g.pieces)] == [start // p.spatial for start in starts]
    assert g.even == (lengths.pop() if len(lengths) == 1 else 0)


@given(problems(1 << 20, 1), st.data())
def test_pieces_of_huge_samples(p: Problem, data: st.DataObject) -> None:
    g = geometry(p)
    # The closed form multiplies an index by S and by L; no tensor that fits a device comes near.
    assume(g.size * (p.spatial + g.group_size) < 1 << 63)
    i = data.draw(st.integers(0, g.pieces - 1))
    start, end = g.piece_start(i), g.piece_start(i + 1)
    assert 0 <= start < end <= g.size
    assert g.piece_of(start) == g.piece_of(end - 1) == i
    assert start // p.spatial == (end - 1) // p.spatial
    assert start // g.group_size == (end - 1) // g.group_size
    assert start % p.spatial == 0 or start % g.group_size == 0


def expected(p: Problem, channels_last: bool, offset: int) -> tuple[int, int]:
    """Channel and cell of the element at this place in memory."""
    size = p.channels * p.spatial
    n, r = divmod(offset, size)
    d = r % p.channels * p.spatial + r // p.channels if channels_last else r
    cell = (n if p.per_sample else 0) * p.groups + d // (size // p.groups)
    return d // p.spatial, cell


def plan_of(
    p: Problem, element_size: int, channels_last: bool, aligned: bool, sms: int, **options: Any
) -> Any:
    """The streaming plan: the walk on the chip is the same, and tests/test_plan.py holds both."""
    problem = host.Problem(
        geometry(p),
        element_size=element_size,
        channels_last=channels_last,
        aligned=aligned,
        **options,
    )
    return host.plan_streaming(problem, host.Device(num_sms=sms))


@given(problems(20, 4), ELEMENT_SIZES, st.booleans(), st.booleans(), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_every_element_once(
    p: Problem, element_size: int, channels_last: bool, aligned: bool, splits: int
) -> None:
    g = geometry(p)
    plan = plan_of(p, element_size, channels_last, aligned, sms=4)
    # A plan splits large tensors only, but the walk must be right for any number of splits.
    plan.splits = splits
    size = g.size
    visited = []
    # Small blocks only, or the example costs a second: the plan is free to launch more of them.
    assume(plan.blocks * plan.block <= 20_000)
    for job in range(plan.blocks):
        for thread in range(plan.block):
            there = host.walk(g, plan, job, thread, limit=p.samples * size + 1)
            back = host.walk(g, plan, job, thread, limit=p.samples * size + 1, back=True)
            steps = [there[i : i + plan.vector] for i in range(0, len(there), plan.vector)]
            assert back == [element for step in reversed(steps) for element in step]
            visited += there
    assert sorted(offset for offset, _, _ in visited) == list(range(p.samples * size))
    for offset, channel, cell in visited:
        assert (channel, cell) == expected(p, channels_last, offset)


@given(problems(300, 5), st.booleans(), SMS)
@settings(max_examples=100, deadline=None)
def test_apply_in_place_touches_every_element_once(
    p: Problem, channels_last: bool, sms: int
) -> None:
    """Doubling in place: an element visited twice would come out four times as large."""
    numel = p.samples * p.channels * p.spatial
    assume(numel <= 50_000)
    x = torch.arange(1, numel + 1, dtype=torch.float32)
    cells = geometry(p).cells
    mean, rstd = torch.zeros(cells), torch.full((cells,), 2.0)
    call = host.Call(
        dtype="float32",
        channels_last=channels_last,
        samples=p.samples,
        channels=p.channels,
        spatial=p.spatial,
        num_groups=p.groups,
        per_sample=p.per_sample,
        device=host.Device(num_sms=sms),
    )
    want = 2 * x
    pointers = (x.data_ptr(), mean.data_ptr(), rstd.data_ptr(), 0, 0, 0, x.data_ptr())
    host.apply(call, *pointers, 0, 0.0, 0)
    assert torch.equal(x, want)


@given(problems(1 << 17, 1 << 12), ELEMENT_SIZES, st.booleans(), st.booleans(), SMS, st.data())
@settings(deadline=None)
def test_plan_of_any_size(
    p: Problem,
    element_size: int,
    channels_last: bool,
    aligned: bool,
    sms: int,
    data: st.DataObject,
) -> None:
    """Up to 2^46 elements: 64-bit offsets at both ends of the work."""
    g = geometry(p)
    assume(g.size * (p.spatial + g.group_size) < 1 << 63)
    plan = plan_of(p, element_size, channels_last, aligned, sms)
    numel = p.samples * g.size
    job = data.draw(st.sampled_from([0, plan.blocks // 2, plan.blocks - 1]))
    thread = data.draw(st.sampled_from([0, plan.block - 1]))
    for offset, channel, cell in host.walk(g, plan, job, thread, limit=32):
        assert 0 <= offset < numel
        assert (channel, cell) == expected(p, channels_last, offset)


def test_small_work_is_split_over_a_large_device() -> None:
    """Few channels, many elements: the blocks of one channel share it."""
    for channels_last in (False, True):
        plan = plan_of(Problem(32, 3, 50_000, 3, False), 4, channels_last, True, 132)
        assert plan.blocks >= 132


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [16, 64, 512])
def test_any_channels_fill_whole_waves(channels: int, channels_last: bool) -> None:
    """C = 64 keeps an H200 as busy as C = 512: the last wave is nearly full."""
    p = Problem(256, channels, 56 * 56, channels, False)
    plan = plan_of(p, 2, channels_last, True, 132)
    resident = 132 * plan.ctas_per_sm
    waves = plan.blocks / resident
    assert waves / math.ceil(waves) >= 0.9


ODD = [(7, 2, "frames"), (7, 4, "frames"), (14, 2, "frames"), (14, 4, "runs"), (56, 2, "runs")]


@pytest.mark.parametrize(("side", "element_size", "pattern"), ODD)
def test_odd_images_move_16_bytes_an_access(side: int, element_size: int, pattern: str) -> None:
    plan = plan_of(Problem(32, 512, side * side, 512, False), element_size, False, True, 132)
    assert plan.pattern == getattr(host.Pattern, pattern)
    assert plan.vector * element_size == 16

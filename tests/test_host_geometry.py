"""Pieces and launch plans: closed forms against counting, and limits for shapes of any size."""

from __future__ import annotations

import math
from typing import Any

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


@given(problems(20, 4), ELEMENT_SIZES, st.booleans(), st.booleans(), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_every_element_once(
    p: Problem, element_size: int, channels_last: bool, aligned: bool, splits: int
) -> None:
    g = geometry(p)
    plan = host.Plan(g, element_size, channels_last, aligned, num_sms=4)
    # A plan splits large tensors only, but the walk must be right for any number of splits.
    plan.splits = splits
    size = g.size
    visited = []
    # Small blocks only, or the example costs a second: the plan is free to launch more of them.
    assume(plan.blocks * plan.block <= 20_000)
    for block in range(plan.blocks):
        for thread in range(plan.block):
            visited += host.walk(g, plan, block, thread, limit=p.samples * size + 1)
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
    problem = host.Problem(
        dtype="float32",
        channels_last=channels_last,
        samples=p.samples,
        channels=p.channels,
        spatial=p.spatial,
        num_groups=p.groups,
        per_sample=p.per_sample,
        sms=sms,
    )
    want = 2 * x
    pointers = (x.data_ptr(), mean.data_ptr(), rstd.data_ptr(), 0, 0, 0, x.data_ptr())
    host.apply(problem, *pointers, 0, 0.0)
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
    """Up to 2^46 elements: the limits of a launch, and 64-bit offsets at both ends of the work."""
    g = geometry(p)
    assume(g.size * (p.spatial + g.group_size) < 1 << 63)
    plan = host.Plan(g, element_size, channels_last, aligned, sms)
    assert plan.block % 32 == 0
    assert 32 <= plan.block <= 256
    assert plan.combine_block % 32 == 0
    assert 32 <= plan.combine_block <= 256
    assert plan.block % plan.lanes == 0
    assert plan.vector in (1, 16 // element_size)
    assert aligned or plan.vector == 1
    assert 1 <= plan.grid <= min(plan.blocks, (1 << 31) - 1)
    assert plan.blocks == plan.tiles * plan.splits
    # Splits are for filling the device: at most one block a tile more than wanted.
    assert plan.splits == 1 or plan.blocks <= 8 * sms + plan.tiles
    partials = g.sets * g.pieces * plan.splits
    assert host.forward_workspace_bytes(g, plan, 4) == 16 * partials
    assert host.backward_workspace_bytes(g, plan, 4) == 8 * (partials + g.cells)

    numel = p.samples * g.size
    block = data.draw(st.sampled_from([0, plan.blocks // 2, plan.blocks - 1]))
    thread = data.draw(st.sampled_from([0, plan.block - 1]))
    for offset, channel, cell in host.walk(g, plan, block, thread, limit=32):
        assert 0 <= offset < numel
        assert (channel, cell) == expected(p, channels_last, offset)


def test_small_work_is_split_over_a_large_device() -> None:
    """Few channels, many elements: the blocks of one channel share it."""
    for channels_last in (False, True):
        plan = host.Plan(host.Geometry(32, 3, 50_000, 3, False), 4, channels_last, True, 132)
        assert plan.splits > 1
        assert plan.blocks >= 2 * 132

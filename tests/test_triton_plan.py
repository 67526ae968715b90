"""What the Triton kernels are planned by: pieces, sweeps and slices cover everything exactly once.

Pure functions of integers, so all of it runs anywhere; ``covered`` repeats the kernels' arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fusednorm.triton_kernels import plan
from fusednorm.triton_kernels.geometry import Geometry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

STANDARD = plan.Limits.standard()
STREAMING = replace(
    STANDARD, tile=64, columns=16, frame=64, segments=256, frame_rows=2, threads=64, fan_from=2,
    chip_bytes=0, cache_bytes=0,
)  # fmt: skip
PATHS = {
    "streaming": STREAMING,
    "captured": STREAMING,
    "onchip": replace(STANDARD, small=1 << 62),
    "cache": replace(
        STREAMING, cache_bytes=1 << 20, chip_threads=32, loop_elements=4, segments=4096
    ),
    "standard": STANDARD,
}


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    n, c, s = (draw(st.integers(1, m)) for m in (4, 24, 40))
    divisors = [g for g in range(1, c * s + 1) if c * s % g == 0]
    return Geometry(n, c, s, draw(st.sampled_from(divisors)), draw(st.booleans()))


@given(geometries())
def test_pieces_are_the_common_refinement(g: Geometry) -> None:
    cuts = sorted({*range(0, g.sample, g.spatial), *range(0, g.sample, g.group)})
    assert [g.piece_start(p) for p in range(g.pieces)] == cuts
    assert g.piece_start(g.pieces) == g.sample
    owner = [sum(cut <= d for cut in cuts) - 1 for d in range(g.sample)]
    assert [g.piece_of(d) for d in range(g.sample)] == owner
    lengths = [b - a for a, b in zip(cuts, [*cuts[1:], g.sample], strict=True)]
    assert g.longest == max(lengths)
    assert g.regular == (set(lengths) == {g.unit}) or g.unit == max(lengths)
    assert all(length % g.unit == 0 for length in lengths)
    assert g.count * g.cells == g.n * g.sample
    assert g.whole_groups().pieces == g.groups


def covered(s: plan.Sweep) -> Tensor:
    """How often a sweep's blocks touch each element of (N, C*S): the kernels' arithmetic."""
    g = s.geometry
    seen = torch.zeros(g.n, g.sample, dtype=torch.int64)
    rows = [range(a * g.rows, (a + 1) * g.rows) for a in range(g.sets)]
    if s.pattern == "runs":
        for a in range(g.sets):
            for p in range(g.pieces):
                start, end = g.piece_start(p), g.piece_start(p + 1)
                tall = plan.ceil_div(g.rows, s.block_rows)
                tiles = tall * plan.ceil_div(end - start, s.block_cols)
                for t in range(s.splits):
                    for i in range(tiles * t // s.splits, tiles * (t + 1) // s.splits):
                        top, left = i % tall * s.block_rows, start + i // tall * s.block_cols
                        chosen = rows[a][top : top + s.block_rows]
                        seen[chosen.start : chosen.stop, left : min(left + s.block_cols, end)] += 1
        return seen
    length = s.positions // s.ranges
    for a in range(g.sets):
        for q in range(s.ranges):
            where = [(n, q * length + i) for n in rows[a] for i in range(length)]
            tiles = plan.ceil_div(len(where), s.block_rows)
            for t in range(s.splits):
                first, end = tiles * t // s.splits, tiles * (t + 1) // s.splits
                for n, i in where[first * s.block_rows : end * s.block_rows]:
                    for tile in range(s.tiles):
                        for col in range(tile * s.stride, min((tile + 1) * s.stride, s.columns)):
                            seen[n, col * s.positions + i] += 1
    return seen


LIMITS = [*PATHS.values(), replace(PATHS["onchip"], chip_bytes=2048)]


# conftest's autouse fixture and hypothesis both apply, and neither matters here.
@settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    geometries(),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
    st.integers(1, 200),
    st.sampled_from(LIMITS),
)
def test_plans_cover_exactly_once(
    g: Geometry, itemsize: int, nhwc: bool, sms: int, limits: plan.Limits
) -> None:
    p = plan.make_plan(g, itemsize, nhwc, sms, limits)
    onchip = [o for o in (p.forward, p.backward) if o is not None]
    for s in (p.moments, p.reduce, p.apply, *(o.sweep for o in onchip)):
        assert (covered(s) == 1).all()
        for size in (s.block_rows, s.block_cols, s.num_warps):
            assert size & (size - 1) == 0
        # 16 bytes at most, and every access starts on a multiple of them.
        assert s.vec * itemsize <= 16
        if s.pattern == "runs":
            assert s.strided == (nhwc and g.spatial > 1)
            assert s.vec == 1 if s.strided else s.geometry.unit % s.vec == 0
        else:
            assert s.columns % s.vec == 0
            assert s.stride % s.vec == 0 or s.stride >= s.columns
            assert s.stride <= s.block_cols
            assert s.block_rows * s.columns < 2**31
    for s in (p.moments, p.reduce):
        check_folding(s)
    for o, backward in ((p.forward, False), (p.backward, True)):
        if o is not None:
            check_slices(o, backward)


def check_folding(s: plan.Sweep) -> None:
    """Every split in one fan, every cell in one bundle, and counters for all of them."""
    assert s.fans * s.fan >= s.splits > (s.fans - 1) * s.fan
    if s.pattern == "runs":
        assert s.fan == 1
        return
    assert s.geometry.regular
    for tile in range(0, s.tiles, s.bundle):
        assert tile * s.stride % s.span == 0, "a cell in two bundles"
    bundles = s.geometry.sets * s.ranges * plan.ceil_div(s.tiles, s.bundle)
    if s.splits * min(s.bundle, s.tiles) > 1:
        assert s.counters >= bundles + (s.owners * s.fans if s.fan > 1 else 0)


def check_slices(o: plan.Onchip, backward: bool) -> None:
    """A block has whole cells, and whole channels backward; segments are enough for both."""
    s = o.sweep
    assert s.splits == 1
    wholes = {s.span: o.cells} | ({s.width: o.channels} if backward else {})
    for whole, segments in wholes.items():
        assert s.stride % whole == 0 or s.stride >= s.columns
        assert segments == 0 if whole == 1 else segments >= plan.ceil_div(s.stride, whole)
    if backward:
        assert s.ranges == 1
    if o.stats == 1:
        first = {tile * s.stride for tile in range(s.tiles)}
        for left in first:
            last = min(left + s.stride, s.columns) - 1
            assert left // s.span == last // s.span
            assert left // s.width == last // s.width
    rows = s.geometry.rows * s.positions // s.ranges
    assert o.looped or s.block_rows >= rows


RESNET = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14)]
RESNET += [(1024, 14), (512, 14), (512, 7), (2048, 7)]


@pytest.mark.parametrize("nhwc", [False, True])
def test_sweeps_fill_a_card_with_one_wave(nhwc: bool) -> None:
    """ResNet-50's layers at batch 32 on 132 multiprocessors, C = 64 like C = 512."""
    for c, hw in RESNET:
        p = plan.make_plan(Geometry(32, c, hw * hw, c, False), 2, nhwc, 132, STANDARD)
        for s in (p.moments, p.reduce, p.apply):
            wave = 132 * STANDARD.threads // (32 * s.num_warps)
            elements = 32 * c * hw * hw / (s.block_rows * s.block_cols)
            assert s.grid >= min(wave, elements) / 2, (c, hw, s)
            assert s.splits == 1 or s.grid <= wave, (c, hw, s)


@pytest.mark.parametrize("nhwc", [False, True])
def test_small_layers_are_one_launch(nhwc: bool) -> None:
    """ResNet-50 at batch 2 in half types: all layers both ways, but the stem in NHWC, where a
    slice of 16 bytes a pixel is 400 KB."""
    for c, hw in RESNET:
        p = plan.make_plan(Geometry(2, c, hw * hw, c, False), 2, nhwc, 132, STANDARD)
        small = not (nhwc and hw == 112)
        assert (p.backward is not None) == small, (c, hw)
        assert (p.forward is not None) or not small, (c, hw)


def test_odd_planes_are_read_wide() -> None:
    """7x7 and 14x14 planes of half types: 16 bytes an access in both sweeps."""
    for c, hw in ((512, 7), (2048, 7), (256, 14), (1024, 14)):
        p = plan.make_plan(Geometry(128, c, hw * hw, c, False), 2, False, 132, STANDARD)
        assert [s.vec for s in (p.moments, p.reduce, p.apply)] == [8, 8, 8], (c, hw)

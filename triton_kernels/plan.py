"""Launch plans: what to launch for a shape, as plain data made by pure functions.

A plan depends on the geometry, the element size, the layout and the number of multiprocessors,
never on a measurement made at run time. ``make_plan`` is the one entry.

    sweep     runs      a block owns a split of one piece (rows of a contiguous or strided run)
              columns   a block owns a tile of columns and a split of one range's rows; columns.py
                        says what columns are in NHWC and, as frames, in NCHW
    splits    T blocks share a piece (or tile), each a contiguous range of its row tiles
    onchip    a block owns complete cells and keeps them: one launch where slices are small
    vec       elements that provably start every access on a multiple of vec elements: 16 bytes
              where shapes allow. Base addresses are Triton's own specialization.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from .geometry import Geometry


@dataclass(frozen=True)
class Limits:
    """What plans are cut to. Reasoned from registers and caches, not measured on a card."""

    # A thread's share of a tile: two 16-byte loads a tensor, but 8 elements at most where each
    # needs an address of its own. 16 addresses, or 16 double or GELU values, spill.
    tile: int
    thread_bytes: int
    scalar_elements: int
    # Threads a multiprocessor that a sweep is cut for: one wave with 128 registers a thread. Both
    # sweeps of an operator have the same cut, so that the second one begins with what the first
    # has left in the L2 cache.
    threads: int
    # Columns a block covers in NHWC: one or two 128-byte lines of half types.
    columns: int
    # Columns of a frame, and columns x pieces that a block tells apart in one go.
    frame: int
    segments: int
    # Samples from which frames pay: a frame loads four numbers a column, a run four numbers.
    frame_rows: int
    # Splits that one block still merges alone.
    fan_from: int
    # Bytes a block keeps in registers, in the accumulation type: 32 of each thread's 128, and as
    # many backward for x and dy. Columns whose statistics differ: 8 a thread.
    chip_bytes: int
    chip_columns: int
    chip_threads: int
    # Bytes of x (and dy) that a block reads twice, from the L1 cache the second time, and the
    # elements of a thread's share of a tile.
    cache_bytes: int
    loop_elements: int
    # Bytes of x up to which a launch costs more than that, or than half sectors.
    small: int

    @staticmethod
    def standard() -> Limits:
        return Limits(
            tile=2048,
            thread_bytes=32,
            scalar_elements=8,
            threads=512,
            columns=128,
            frame=2048,
            segments=4096,
            frame_rows=4,
            fan_from=16,
            chip_bytes=1 << 16,
            chip_columns=4096,
            chip_threads=512,
            cache_bytes=200 << 10,
            loop_elements=16,
            small=1 << 22,
        )


@dataclass(frozen=True)
class Sweep:
    """One launch over x. ``geometry`` is the one whose pieces have the partials."""

    pattern: str
    geometry: Geometry
    splits: int
    block_rows: int
    block_cols: int
    vec: int
    num_warps: int
    strided: bool = False
    # Of columns only: columns a channel, ranges of a channel, columns a block, splits a fan.
    width: int = 1
    ranges: int = 1
    stride: int = 1
    fan: int = 1

    @property
    def columns(self) -> int:
        g = self.geometry
        return g.sample // self.positions

    @property
    def positions(self) -> int:
        """Rows a sample."""
        return 1 if self.width > 1 else self.geometry.spatial

    @property
    def unit(self) -> int:
        """Columns a piece."""
        return self.geometry.unit if self.width > 1 and self.geometry.regular else 1

    @property
    def span(self) -> int:
        """Columns a cell."""
        return max(1, self.geometry.group // self.positions)

    @property
    def tiles(self) -> int:
        return ceil_div(self.columns, self.stride)

    @property
    def owners(self) -> int:
        """Blocks but for the splits."""
        g = self.geometry
        return g.sets * (g.pieces if self.pattern == "runs" else self.ranges * self.tiles)

    @property
    def grid(self) -> int:
        return self.owners * self.splits

    @property
    def fans(self) -> int:
        return ceil_div(self.splits, self.fan)

    @property
    def planes(self) -> int:
        """Partials that cells are made of."""
        return self.geometry.sets * self.geometry.pieces * self.fans

    @property
    def partials(self) -> int:
        """All partials, those of splits that fans merge among them."""
        below = self.geometry.sets * self.geometry.pieces * self.splits if self.fan > 1 else 0
        return self.planes + below

    @property
    def bundle(self) -> int:
        """Tiles whose cells no other tile shares."""
        if self.stride % self.span == 0:
            return 1
        return self.span // self.stride if self.span % self.stride == 0 else self.tiles

    @property
    def cells(self) -> int:
        """Cells that one block finishes."""
        if self.pattern == "runs":
            return 1
        return max(1, min(self.bundle * self.stride, self.columns) // self.span)

    @property
    def counters(self) -> int:
        """Zeros that the last arrivals need; none where every cell has one partial."""
        g = self.geometry
        if self.pattern == "runs":
            return 0 if self.splits == 1 and g.pieces == g.groups else g.cells
        bundles = g.sets * self.ranges * ceil_div(self.tiles, self.bundle)
        if self.fan > 1:
            return self.owners * self.fans + bundles
        return 0 if self.splits == self.bundle == 1 else bundles


@dataclass(frozen=True)
class Onchip:
    """One launch whose blocks own complete cells, and the segments a block tells apart in them.

    0 segments: every column is its own. Looped, rows come in several tiles, and twice.
    """

    sweep: Sweep
    cells: int
    channels: int
    looped: bool

    @property
    def stats(self) -> int:
        """Numbers a block keeps for its columns: one where they share cell and channel."""
        return 1 if self.cells == self.channels == 1 else self.sweep.block_cols


@dataclass(frozen=True)
class Plan:
    """The launches of the operators. On-chip ones come first; the sweeps are always there."""

    forward: Onchip | None
    backward: Onchip | None
    moments: Sweep
    reduce: Sweep
    apply: Sweep


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def step(cells: int) -> tuple[int, int]:
    """(CELLS, STEP) of merging: 256 to 512 partials at a time, 2 or 4 a thread in 4 warps, because
    8 would take more registers than the sweep that does it on the side."""
    rows = min(power_of_two(cells), 128)
    return rows, max(4, 256 // rows)


def fits_columns(geometry: Geometry) -> bool:
    """Every channel is cut alike: groups are whole channels, or channels whole groups."""
    return geometry.channels % geometry.groups == 0 or geometry.groups % geometry.channels == 0


class Planner:
    """The factories of one geometry's launches."""

    def __init__(self, geometry: Geometry, itemsize: int, nhwc: bool, sms: int, limits: Limits):
        self.geometry, self.itemsize, self.sms, self.limits = geometry, itemsize, sms, limits
        # With one position NCHW is NHWC.
        self.nhwc = nhwc or geometry.spatial == 1
        self.full = 16 // itemsize
        # Twice the registers a value.
        self.tile = limits.tile // (2 if itemsize == 8 else 1)

    def warps(self, tile: int, vec: int) -> int:
        elements = self.limits.thread_bytes // self.itemsize
        if vec == 1:
            elements = min(elements, self.limits.scalar_elements)
        return max(1, tile // (32 * elements))

    def splits(self, num_warps: int, owners: int, tiles: int) -> int:
        """Blocks an owner so that all are resident at once, none of them without a tile."""
        blocks = self.sms * max(1, self.limits.threads // (32 * num_warps))
        return max(1, min(blocks // max(owners, 1), tiles))

    def runs(self, g: Geometry) -> Sweep:
        """Tiles of samples x elements of a run: short runs are stacked, long ones cut."""
        cols = min(power_of_two(g.longest), self.tile)
        rows = min(power_of_two(g.rows), self.tile // cols)
        tiles = ceil_div(g.rows, rows) * ceil_div(g.longest, cols)
        vec = 1 if self.nhwc else math.gcd(self.full, g.unit)
        num_warps = self.warps(rows * cols, vec)
        splits = self.splits(num_warps, g.sets * g.pieces, tiles)
        return Sweep("runs", g, splits, rows, cols, vec, num_warps, strided=self.nhwc)

    def columns(self, g: Geometry, cols: int, vec: int, **columns: int) -> Sweep:
        """Tiles of rows x columns; a block's threads run along the columns first."""
        one = Sweep("columns", g, 1, 1, cols, vec, 1, **columns)
        rows = g.rows * (one.positions // one.ranges)
        block_rows = min(power_of_two(rows), self.tile // cols)
        num_warps = self.warps(block_rows * cols, vec)
        splits = self.splits(num_warps, one.owners, ceil_div(rows, block_rows))
        fan = 1 if splits <= self.limits.fan_from else math.isqrt(splits - 1) + 1
        return Sweep("columns", g, splits, block_rows, cols, vec, num_warps, fan=fan, **columns)

    def positions(self, g: Geometry) -> Sweep:
        """NHWC: a row is a position. Cells are kept in one tile where a tile can hold them."""
        cols = min(power_of_two(g.channels), self.limits.columns)
        vec = math.gcd(self.full, g.channels)
        whole = math.lcm(max(1, g.channels // g.groups), vec)
        stride = cols // whole * whole or cols
        return self.columns(g, cols, vec, ranges=max(1, g.groups // g.channels), stride=stride)

    def frames(self, g: Geometry, reduces: bool) -> Sweep | None:
        """NCHW: a row is a sample. None where runs are as wide, or a frame has too few rows."""
        vec = math.gcd(self.full, g.sample)
        if self.nhwc or vec <= math.gcd(self.full, g.unit) or g.rows < self.limits.frame_rows:
            return None
        width = self.geometry.spatial
        if not reduces:
            cols = min(power_of_two(g.sample), self.tile // 4)
            return self.columns(g, cols, vec, width=width, stride=cols)
        pieces = vec // math.gcd(vec, g.unit)
        if not g.regular or pieces * g.unit > self.limits.frame:
            return None
        while pieces < g.pieces and self._segments(2 * pieces, 2 * pieces * g.unit) and (
            2 * pieces * g.unit <= self.tile // 4
        ):  # fmt: skip
            pieces *= 2
        stride = pieces * g.unit
        return self.columns(g, power_of_two(stride), vec, width=width, stride=stride)

    def _segments(self, segments: int, cols: int) -> bool:
        return power_of_two(segments) * power_of_two(cols) <= self.limits.segments

    def sweep(self, g: Geometry, reduces: bool) -> Sweep:
        if self.nhwc and fits_columns(g):
            return self.positions(g)
        frames = self.frames(g, reduces)
        # Offsets in a tile of columns have 32 bits.
        if frames is None or frames.block_rows * frames.columns >= 1 << 31:
            return self.runs(g)
        return frames

    def onchip(self, tensors: int) -> Onchip | None:
        """The launch that holds ``tensors`` of x's shape (x, and dy backward), if slices fit."""
        limits, g, backward = self.limits, self.geometry, tensors > 1
        ranges = max(1, g.groups // g.channels) if self.nhwc else 1
        if (self.nhwc and not fits_columns(g)) or (backward and ranges > 1):
            return None
        width = 1 if self.nhwc else g.spatial
        least = Sweep("columns", g, 1, 1, 1, 1, 1, width=width, ranges=ranges)
        # Neither a cell nor, backward, a channel may be cut.
        whole = math.lcm(least.span, width) if backward else least.span
        small = g.n * g.sample * self.itemsize <= limits.small
        widest = math.gcd(self.full, least.columns)
        # Wide accesses first; narrow ones and reading twice only where a launch costs more.
        for vec in (widest, 1) if small else (widest,):
            for looped in (False, True) if small else (False,):
                found = None
                for stride in self._strides(whole, least.columns, small):
                    slice_ = self._slice(least, stride, tensors, looped)
                    if slice_ is None or slice_.sweep.vec < vec:
                        continue
                    found = slice_
                    if 4 * found.sweep.grid >= self.sms:
                        break
                if found is not None:
                    return found
        return None

    def _slice(self, least: Sweep, stride: int, tensors: int, looped: bool) -> Onchip | None:
        """The launch with blocks of ``stride`` columns, if they fit."""
        limits, g = self.limits, self.geometry
        cols = power_of_two(stride)
        cells = 0 if least.span == 1 else power_of_two(ceil_div(stride, least.span))
        channels = 0 if least.width == 1 else power_of_two(self._channels(stride))
        most = max(cells, channels if tensors > 1 else 0)
        if most > 1 and not self._segments(most, cols):
            return None
        length = g.rows * (least.positions // least.ranges)
        rows, vec = power_of_two(length), math.gcd(self.full, least.columns, stride)
        one = cells == channels == 1
        # A statistic for every column, and an address for every element, take registers too.
        if (not one and cols > limits.chip_columns) or rows * least.columns >= 1 << 31:
            return None
        elements = limits.chip_bytes // max(4, self.itemsize)
        elements //= (2 if tensors > 1 else 1) * (1 if vec > 1 else 2)
        if looped:
            if tensors * length * min(stride, least.columns) * self.itemsize > limits.cache_bytes:
                return None
            elements = limits.chip_threads * limits.loop_elements
            # One number for all columns leaves registers for 64 bytes a thread.
            elements = elements * 4 // self.itemsize if one else elements // tensors
            elements = max(1, elements // (1 if vec > 1 else 4))
            if cols > elements:
                return None
            rows = min(rows, elements // cols)
        elif rows * cols > elements:
            return None
        num_warps = min(limits.chip_threads // 32, max(1, rows * cols // 256))
        sweep = replace(
            least, block_rows=rows, block_cols=cols, vec=vec, num_warps=num_warps, stride=stride
        )
        return Onchip(sweep, cells, channels, looped)

    def _channels(self, stride: int) -> int:
        """Channels that so many columns of a frame may touch."""
        spatial = self.geometry.spatial
        if stride % spatial == 0 or spatial % stride == 0:
            return max(1, stride // spatial)
        return ceil_div(stride, spatial) + 1

    def _strides(self, whole: int, columns: int, small: bool) -> list[int]:
        """Columns a block may cover on chip, widest first; the narrowest that fits is the last.

        NHWC wants sectors of 32 bytes unless everything is small; frames want 16 bytes, and more
        than that only to give a block some work.
        """
        if self.nhwc:
            least = 8 if small else 32
            targets = [b // self.itemsize for b in (128, 64, 32, 16, 8) if b >= least]
        else:
            rows = self.geometry.rows
            aligned = self.full // math.gcd(self.full, whole) * whole
            targets = [self.tile // power_of_two(rows), aligned, whole]
        strides = {min(max(whole, t // whole * whole), columns) for t in targets}
        if self.nhwc:
            strides = {s for s in strides if s == columns or s * self.itemsize >= least}
        return sorted(strides, reverse=True)


@functools.lru_cache(maxsize=4096)
def make_plan(geometry: Geometry, itemsize: int, nhwc: bool, num_sms: int, limits: Limits) -> Plan:
    """The plan for a non-empty x."""
    planner = Planner(geometry, itemsize, nhwc, num_sms, limits)
    # In NCHW a group is one run whatever channels it covers; in NHWC only a piece has one stride.
    moments = geometry if planner.nhwc else geometry.whole_groups()
    return Plan(
        planner.onchip(1),
        planner.onchip(2),
        planner.sweep(moments, True),
        planner.sweep(geometry, True),
        planner.sweep(geometry, False),
    )

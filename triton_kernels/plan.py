"""Launch plans: what to launch for a shape, as plain data made by pure functions.

A plan depends on the geometry, the element size, the layout and the number of multiprocessors,
never on a measurement made at run time. ``make_plan`` is the one entry.

    pattern   runs      a block owns a split of one piece (rows of a contiguous or strided run)
              columns   a block owns a tile of channels and a split of one s-range's rows
    splits    T blocks share a piece (or s-range), each a contiguous range of its tiles. Partials
              are one entry a split and piece, so T is also the length of the fixed-order merge.
    vec       elements that provably start every access on a multiple of vec elements: 16 bytes
              where shapes allow. Base addresses are Triton's own specialization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .geometry import Geometry

# A thread's share of a tile: two 16-byte loads a tensor, but 8 elements at most where each needs an
# address of its own. 16 addresses, or 16 double or GELU values, take all registers and spill.
TILE = 2048
THREAD_BYTES = 32
SCALAR_ELEMENTS = 8

# Blocks a multiprocessor. A reducing sweep wants one full wave (its splits are merged again);
# an elementwise one wants several, so that the tail of the last wave is short.
REDUCE_BLOCKS = 8
APPLY_BLOCKS = 32

# Channels a block of columns covers: one or two 128-byte lines of half types.
MAX_BLOCK_CHANNELS = 128


@dataclass(frozen=True)
class Sweep:
    """One launch over x: tiles of block_rows x block_cols, ``splits`` blocks a piece or range."""

    splits: int
    block_rows: int
    block_cols: int
    vec: int
    num_warps: int


@dataclass(frozen=True)
class Plan:
    """The sweeps of one operator call, and the geometry whose pieces the moments are kept for."""

    pattern: str
    strided: bool
    ranges: int
    moments: Geometry
    reduce_moments: Sweep
    reduce: Sweep
    apply: Sweep


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def fits_columns(geometry: Geometry) -> bool:
    """Every channel is cut alike: groups are whole channels, or channels whole groups."""
    return geometry.channels % geometry.groups == 0 or geometry.groups % geometry.channels == 0


def _splits(blocks: int, owners: int, tiles: int) -> int:
    """Blocks an owner so that the launch has about ``blocks``, none of them without a tile."""
    return max(1, min(ceil_div(blocks, max(owners, 1)), tiles))


def _warps(tile: int, vec: int, itemsize: int) -> int:
    elements = THREAD_BYTES // itemsize
    return max(1, tile // (32 * (elements if vec > 1 else min(elements, SCALAR_ELEMENTS))))


def runs_sweep(geometry: Geometry, itemsize: int, strided: bool, blocks: int) -> Sweep:
    """Tiles of samples x elements of a run: short runs are stacked, long ones cut."""
    block_cols = min(power_of_two(geometry.longest), TILE)
    block_rows = min(power_of_two(geometry.rows), TILE // block_cols)
    tiles = ceil_div(geometry.rows, block_rows) * ceil_div(geometry.longest, block_cols)
    vec = 1 if strided else math.gcd(16 // itemsize, geometry.unit)
    splits = _splits(blocks, geometry.sets * geometry.pieces, tiles)
    return Sweep(
        splits, block_rows, block_cols, vec, _warps(block_rows * block_cols, vec, itemsize)
    )


def columns_sweep(geometry: Geometry, itemsize: int, ranges: int, blocks: int) -> Sweep:
    """Tiles of rows (n, s) x channels; a block's threads run along the channels first."""
    rows = geometry.rows * (geometry.spatial // ranges)
    block_cols = min(power_of_two(geometry.channels), MAX_BLOCK_CHANNELS)
    block_rows = min(power_of_two(rows), TILE // block_cols)
    owners = geometry.sets * ranges * ceil_div(geometry.channels, block_cols)
    vec = math.gcd(16 // itemsize, geometry.channels)
    splits = _splits(blocks, owners, ceil_div(rows, block_rows))
    return Sweep(
        splits, block_rows, block_cols, vec, _warps(block_rows * block_cols, vec, itemsize)
    )


def make_plan(geometry: Geometry, itemsize: int, nhwc: bool, num_sms: int) -> Plan:
    """The plan for a non-empty x."""
    few, many = REDUCE_BLOCKS * num_sms, APPLY_BLOCKS * num_sms
    if nhwc and fits_columns(geometry):
        ranges = max(1, geometry.groups // geometry.channels)
        reduce, apply = (columns_sweep(geometry, itemsize, ranges, b) for b in (few, many))
        return Plan("columns", False, ranges, geometry, reduce, reduce, apply)
    # In NCHW a group is one run whatever channels it covers; in NHWC only a piece has one stride.
    moments = geometry if nhwc else geometry.whole_groups()
    return Plan(
        "runs",
        nhwc,
        1,
        moments,
        runs_sweep(moments, itemsize, nhwc, few),
        runs_sweep(geometry, itemsize, nhwc, few),
        runs_sweep(geometry, itemsize, nhwc, many),
    )


def combine_steps(partials: int) -> tuple[int, int]:
    """(partials a step, warps) of the combining kernels: always 4 a thread, one warp if it can."""
    return (128, 1) if partials <= 512 else (1024, 8)

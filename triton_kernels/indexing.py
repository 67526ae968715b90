"""geometry.py's integers on the device: pieces, and where the partials of a cell lie."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiple(n, VEC: tl.constexpr):
    """n, which the plan knows to be a multiple of VEC, in a form that the compiler sees as one."""
    return n // VEC * VEC


@triton.jit
def piece_start(piece, spatial, group, unit, REGULAR: tl.constexpr):
    """First element of a piece; the derivation is in geometry.py."""
    if REGULAR:
        return piece * unit
    else:
        s = spatial // unit
        g = group // unit
        period = piece // (s + g - 1)
        r = piece - period * (s + g - 1)
        i = (r * g + s + g - 1) // (s + g)
        j = (r * s + s + g - 1) // (s + g)
        start = tl.where(i * (s + g) < (r + 1) * g, i * spatial, j * group)
        return period * s * group + start


@triton.jit
def piece_of(d, spatial, group, unit):
    """The piece of element d of a sample."""
    return d // spatial + d // group - d // (spatial // unit * group)


@triton.jit
def stretch(cell, spatial, group, unit, groups, pieces, splits, REGULAR: tl.constexpr):
    """(first, end) of the partials of a cell, or of a vector of cells."""
    if REGULAR:
        length = pieces // groups * splits
        begin = cell.to(tl.int64) * length
        return begin, begin + length
    else:
        base = (cell // groups).to(tl.int64) * pieces
        start = (cell % groups) * group.to(tl.int64)
        begin = (base + piece_of(start, spatial, group, unit)) * splits
        end = (base + piece_of(start + group, spatial, group, unit)) * splits
        return begin, end

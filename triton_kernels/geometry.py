"""Channels, groups and pieces of a sample, in integers.

A sample is the flat run d = c*S + s of its D = C*S elements in NCHW order, whatever the memory
layout. Channels cut it at the multiples of S, groups at the multiples of L = D/G; the *pieces* are
what both cuts leave: each lies in one channel and one group, and the pieces of a channel, and of a
group, are contiguous. Both cuts coincide at the multiples of lcm(S, L), hence

    piece(d) = d//S + d//L - d//lcm(S, L),      P = C + G - gcd(C, G)

The first element of a piece is found in closed form: with s = S/gcd, l = L/gcd, a period of
lcm(S, L) elements holds s + l - 1 pieces, and the r-th of its cuts is the one multiple of S or L
whose d/S + d/L lies in [r, r + 1). ``runs.piece_start`` is the device's copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """(N, C, S) cut into G groups; one set of statistics a sample, or one for all samples."""

    n: int
    channels: int
    spatial: int
    groups: int
    per_sample: bool

    @staticmethod
    def of(shape: Sequence[int], groups: int, per_sample: bool) -> Geometry:
        return Geometry(shape[0], shape[1], math.prod(shape[2:]), groups, per_sample)

    @property
    def sample(self) -> int:
        """D, the elements of a sample."""
        return self.channels * self.spatial

    @property
    def group(self) -> int:
        """L, the elements of a group in one sample."""
        return self.sample // self.groups

    @property
    def unit(self) -> int:
        """gcd(S, L): divides every cut, hence every piece."""
        return math.gcd(self.spatial, self.group)

    @property
    def sets(self) -> int:
        """A, the sets of samples that have statistics of their own."""
        return self.n if self.per_sample else 1

    @property
    def rows(self) -> int:
        """Samples in a set."""
        return 1 if self.per_sample else self.n

    @property
    def cells(self) -> int:
        return self.sets * self.groups

    @property
    def count(self) -> int:
        """Elements of a cell."""
        return self.rows * self.group

    @property
    def pieces(self) -> int:
        """P, the pieces of a sample."""
        return self.channels + self.groups - math.gcd(self.channels, self.groups)

    @property
    def regular(self) -> bool:
        """All pieces are ``unit`` long: groups are whole channels, or channels whole groups."""
        return self.unit == min(self.spatial, self.group)

    @property
    def longest(self) -> int:
        """The longest piece: the first one reaches the first cut of either kind."""
        return min(self.spatial, self.group)

    def piece_of(self, d: int) -> int:
        both = self.spatial // self.unit * self.group
        return d // self.spatial + d // self.group - d // both

    def piece_start(self, piece: int) -> int:
        s, g = self.spatial // self.unit, self.group // self.unit
        period, r = divmod(piece, s + g - 1)
        i, j = -(-r * g // (s + g)), -(-r * s // (s + g))
        from_channel = i * (s + g) < (r + 1) * g
        start = i * self.spatial if from_channel else j * self.group
        return period * s * self.group + start

    def whole_groups(self) -> Geometry:
        """The same elements with a group for a channel: all that moments need in NCHW."""
        return Geometry(self.n, self.groups, self.group, self.groups, self.per_sample)

"""Hypothesis draws of problems: sizes that fit nothing, and groups in every regime."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True)
class Problem:
    samples: int
    channels: int
    spatial: int
    groups: int
    per_sample: bool


@st.composite
def problems(draw: st.DrawFn, largest: int, most_samples: int) -> Problem:
    """Sizes up to `largest`; groups is any divisor of C*S that its small primes can make."""
    samples = draw(st.integers(1, most_samples))
    channels = draw(st.integers(1, largest))
    spatial = draw(st.integers(1, largest))
    groups, rest = 1, channels * spatial
    for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23):
        power = 0
        while rest % prime == 0:
            rest //= prime
            power += 1
        groups *= prime ** draw(st.integers(0, power))
    # What is left is a product of large primes: whole or not at all.
    groups *= draw(st.sampled_from([1, rest]))
    return Problem(samples, channels, spatial, groups, draw(st.booleans()))

"""Hypothesis draws of problems and devices: sizes that fit nothing, groups in every regime."""

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


# Keyword arguments of the host module's Device: an H200 by default, an A100, a consumer card with
# 99 KB of shared memory a block, and what no shop sells: a few SMs with next to no memory.
DEVICES: dict[str, dict[str, int]] = {
    "h200": {},
    "a100": {
        "num_sms": 108,
        "shared_per_block": 166_912,
        "shared_per_sm": 167_936,
        "capability": 80,
        "max_cluster": 1,
    },
    "sm_120": {
        "num_sms": 170,
        "shared_per_block": 101_376,
        "shared_per_sm": 102_400,
        "threads_per_sm": 1536,
        "capability": 120,
        "max_cluster": 8,
    },
    "tiny": {"num_sms": 4, "shared_per_block": 4096, "shared_per_sm": 8192, "max_cluster": 8},
    "uncooperative": {
        "num_sms": 16,
        "shared_per_block": 49_152,
        "shared_per_sm": 65_536,
        "threads_per_sm": 1024,
        "capability": 80,
        "cooperative": 0,
        "max_cluster": 1,
    },
}

devices = st.one_of(
    st.sampled_from(list(DEVICES.values())),
    st.builds(
        lambda sms, kilobytes, share, threads, cluster: {
            "num_sms": sms,
            "shared_per_block": 1024 * kilobytes,
            "shared_per_sm": 1024 * (kilobytes * share + 1),
            "threads_per_sm": threads,
            "max_cluster": cluster,
        },
        st.integers(1, 200),
        st.integers(2, 227),
        st.integers(1, 3),
        st.sampled_from([1024, 1536, 2048]),
        st.sampled_from([1, 2, 8, 16]),
    ),
)

"""A colour and a marker for each provider, the same on the page and in the picture.

Colours start from Okabe and Ito's and were moved until any two stay as far apart as theirs under
every common form of colour blindness, and 3:1 from the page's ground (tests/test_report.py holds
both). Relatives share a colour; the marker alone tells every provider from every other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
# Ground of the page and of the picture: light, dark.
GROUND = ("#ffffff", "#14171c")


@dataclass(frozen=True)
class Style:
    """Colour on a light and on a dark ground, and a marker's outline in a circle of radius 1."""

    light: str
    dark: str
    marker: Sequence[Point]


def _polygon(corners: int, first: float = 90.0, inner: float | None = None) -> list[Point]:
    """A regular polygon, y upwards, its first corner at that angle; a star with an inner radius."""
    radii = [1.0] if inner is None else [1.0, inner]
    count = corners * len(radii)
    angles = [math.radians(first + 360 * i / count) for i in range(count)]
    return [
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


def _plus(turned: float) -> list[Point]:
    arm, half = 1.0, 0.32
    quarter = [(half, arm), (half, half), (arm, half)]
    corners = [(x, y) for x, y in quarter]
    corners += [(y, -x) for x, y in quarter]
    corners += [(-x, -y) for x, y in quarter]
    corners += [(-y, x) for x, y in quarter]
    cos, sin = math.cos(math.radians(turned)), math.sin(math.radians(turned))
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]


_HOURGLASS = [(-0.8, 0.9), (0.8, 0.9), (-0.8, -0.9), (0.8, -0.9)]
_COMPILE = ("#bc5f9f", "#e392c9")
_CUDNN = ("#dc6700", "#f87339")
PROVIDERS: dict[str, Style] = {
    "cuda": Style("#004cbc", "#407ffd", _polygon(24)),
    "triton": Style("#03a562", "#16dd81", _polygon(4, 45)),
    "reference": Style("#4883ff", "#abfcf0", _polygon(4)),
    "cudnn": Style(*_CUDNN, _polygon(3)),
    "cudnn-frontend": Style(*_CUDNN, _polygon(3, 0)),
    "native": Style("#994400", "#ffd14d", _polygon(3, 270)),
    "compile": Style(*_COMPILE, _plus(0)),
    "compile-max-autotune": Style(*_COMPILE, _plus(45)),
    "compile-cooperative": Style(*_COMPILE, _polygon(5, inner=0.42)),
    "eager": Style("#5c5c5b", "#8fab91", _HOURGLASS),
    "apex": Style("#511a7b", "#ba91ec", _polygon(3, 180)),
}
UNKNOWN = Style("#6b6b6b", "#a8a8a8", _polygon(6))
OURS = ("cuda", "triton", "reference")


def style(provider: str) -> Style:
    """The provider's style; names from elsewhere share a grey hexagon."""
    return PROVIDERS.get(provider, UNKNOWN)


def svg_path(marker: Sequence[Point], radius: float = 1.0) -> str:
    """The outline as an SVG path, whose y points down."""
    corners = (f"{radius * x:.3g} {-radius * y:.3g}" for x, y in marker)
    return f"M{'L'.join(corners)}Z"

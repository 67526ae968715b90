"""The predicted times on docs/kernels.md are those of the plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import host_ops

host = host_ops.load()
PAGE = Path(__file__).resolve().parents[1] / "docs/kernels.md"
ROW = re.compile(
    r"\| (\d+)×(\d+)×(\d+)²(, relu, residual, mask)? \| (NCHW|NHWC) \| (.*) \| not yet \|"
)
ROWS = [m.groups() for m in map(ROW.match, PAGE.read_text().splitlines()) if m]


def predicted(problem: object, plan: object) -> str:
    """Microseconds at 4.3 TB/s and 2.5 a node."""
    nodes = plan.nodes  # type: ignore[attr-defined]
    return f"{host.planned_bytes(problem, plan) / 4.3e6 + 2.5 * nodes:.1f}"


def test_the_page_has_rows() -> None:
    assert len(ROWS) >= 7


@pytest.mark.parametrize(("n", "c", "side", "fused", "layout", "cells"), ROWS)
def test_predicted_times(
    n: str, c: str, side: str, fused: str | None, layout: str, cells: str
) -> None:
    geometry = host.Geometry(int(n), int(c), int(side) ** 2, int(c), False)
    want = [f"{2 * int(n) * int(c) * int(side) ** 2 / 1e6:.1f}"]
    for direction in ("forward", "backward"):
        problem = host.Problem(
            geometry,
            element_size=2,
            channels_last=layout == "NHWC",
            direction=direction,
            residual=bool(fused) and direction == "forward",
            mask=bool(fused),
            dresidual=bool(fused) and direction == "backward",
        )
        plan = host.make_plan(problem, host.Device())
        on_chip = plan.path == host.Path.on_chip
        name = str(plan.tier).rsplit(".", 1)[1] if on_chip else "streaming"
        want.append(predicted(problem, host.plan_streaming(problem, host.Device())))
        want.append(f"{predicted(problem, plan)} {name}")
    assert cells.split(" | ") == want

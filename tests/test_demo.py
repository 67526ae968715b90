"""The demo runs from start to finish and leaves what it says it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[1] / "examples" / "digits.py"
NORMS = ["BatchNorm2d", "BatchGroupNorm", "GroupNorm"]


def test_quick_demo(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, str(DEMO), "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert "running on the CPU" in done.stdout
    assert "[6/6]" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert [(row["batch"], row["norm"]) for row in results["summary"]] == [
        (batch, norm) for batch in (2, 32) for norm in NORMS
    ]
    # Ten steps at batch 32 teach little; 160 at batch 2 must have taught batch norm something.
    assert results["summary"][0]["accuracy"] > 40
    for training in results["trainings"]:
        assert training["step_ms"] > 0
        assert training["epochs"][-1] == 1
        assert len(training["accuracy"]) == len(training["epochs"]) == len(training["loss"]) + 1
    kernels = json.loads((out / "bench.json").read_text())["rows"]
    assert {row["op"] for row in kernels} >= {"batch_norm", "batch_group_norm[128]"}
    assert all(row["ms_median"] > 0 for row in kernels)
    page = (out / "results.md").read_text()
    assert "BatchGroupNorm" in page
    assert "batch_group_norm[128]" in page
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")

"""Benchmarks worth believing: exact before timed, failures are rows, the CPU promise holds."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time

import pytest
import torch
from fusednorm.bench import __main__ as command
from fusednorm.bench import gate, operands, report, timing
from fusednorm.bench.registry import (
    ACTIVATIONS,
    DTYPES,
    OPS,
    PROVIDERS,
    Case,
    PlainNorm,
    Provider,
    min_bytes,
    select_ops,
)
from fusednorm.bench.run import FIELDS, Plan, run
from fusednorm.bench.shapes import BY_NAME, RESNET50, Shape, select
from torch import nn
from torch.nn import functional as F

import fusednorm

SMALL = Shape("small", (2, 32, 6, 4))
FAMILIES = ("batch_norm", "batch_group_norm", "group_norm")


@pytest.fixture(autouse=True)
def as_users_run(poisoned):
    """Filling every fresh tensor would be timed too."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False


def small_plan(**changes):
    defaults = {"directions": ("both",), "layouts": ("nchw",), "repetitions": 3}
    plan = {"shapes": [SMALL], "ops": [OPS["batch_norm"]], "providers": [PROVIDERS["native"]]}
    return Plan(**(plan | defaults | changes))


def case(op="batch_norm", **changes):
    base = Case(OPS[op], SMALL.dims, "float32", "nchw", "both")
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    "op, dims",
    [
        pytest.param(op, dims, id=f"{op.name}-{'x'.join(map(str, dims))}")
        for op in OPS.values()
        for dims in ((4, 32, 6, 5), (4, 32), (3, 32, 2, 3, 5))
        if not op.misfit(dims)
    ],
)
def test_float64_truth_is_pytorchs(op, dims):
    """The composition that judges everyone agrees with torch's own kernels to rounding."""
    groups = op.num_groups(dims)
    plain = operands.prepare(PlainNorm(32, groups, op.per_sample, None), "cpu").double()
    x = torch.randn(dims, dtype=torch.float64) + 2
    affine = (plain.weight, plain.bias)
    if op.per_sample:
        expected = F.group_norm(x, groups, *affine)
    else:
        mean, var = torch.zeros(groups).double(), torch.ones(groups).double()
        flat = F.batch_norm(x.reshape(len(x), groups, -1), mean, var, training=True).view(dims)
        weight, bias = (p.view(-1, *(1,) * (len(dims) - 2)) for p in affine)
        expected = flat * weight + bias
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    if not op.per_sample:
        torch.testing.assert_close(plain.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(plain.running_var, var, rtol=1e-12, atol=1e-12)


def test_min_bytes():
    size = SMALL.numel * 4
    plain = {d: min_bytes(case(direction=d)) for d in ("forward", "backward", "both")}
    assert plain == {"forward": 2 * size, "backward": 3 * size, "both": 5 * size}
    fused = case(direction="backward", residual=True)
    assert min_bytes(fused) == 3 * size
    # dresidual is written; relu needs a bit an element, gelu the residual itself.
    assert min_bytes(dataclasses.replace(fused, act="relu")) == 4 * size + SMALL.numel // 8
    assert min_bytes(dataclasses.replace(fused, act="gelu")) == 5 * size
    assert min_bytes(case(direction="forward", residual=True, dtype="bfloat16")) == 3 * size // 2


class Wrong(nn.Module):
    """A provider whose norm is right but for one defect."""

    def __init__(self, defect):
        super().__init__()
        self.norm = nn.BatchNorm2d(32)
        self.defect = defect

    def forward(self, x, residual=None):
        if self.defect == "raises":
            raise RuntimeError("no kernel for this shape\nand a long trace")
        if self.defect == "dx":
            x = x * 1.001 - x.detach() * 0.001
        if self.defect == "dweight":
            weight = self.norm.weight
            scale = weight * 1.001 - weight.detach() * 0.001
            y = F.batch_norm(x, *self.buffers_(), scale, self.norm.bias, training=True)
        else:
            y = self.norm(x)
        if self.defect == "running_var":
            self.norm.running_var = self.norm.running_var * 1.001
        if self.defect == "one element":
            y = y.index_put((torch.tensor(1),) * 4, torch.tensor(0.0))
        if self.defect == "nan":
            y = y.index_put((torch.tensor(1),) * 4, torch.tensor(math.nan))
        return y.double() if self.defect == "dtype" else y

    def buffers_(self):
        return self.norm.running_mean, self.norm.running_var


def provider(defect):
    return Provider("wrong", lambda _: Wrong(defect), FAMILIES)


def measured(*providers, **changes):
    return run(small_plan(providers=providers, **changes)).rows


@pytest.mark.parametrize(
    ("defect", "named"),
    [
        ("one element", "error of y"),
        ("nan", "error of y inf"),
        ("dtype", "y is torch.float64"),
        ("dx", "error of dx"),
        ("dweight", "error of dweight"),
        ("running_var", "error of running_var"),
    ],
)
def test_a_wrong_provider_gets_no_time(defect, named):
    right, wrong = measured(provider(None), provider(defect))
    assert right["ms_median"] > 0
    assert "error" not in right
    assert wrong["ms_median"] is wrong["gb_per_s"] is wrong["pct_copy"] is None
    assert named in wrong["error"]
    assert wrong["error"].startswith("refused a time")


def test_a_provider_that_raises_is_a_row():
    raising, right = measured(provider("raises"), provider(None))
    assert raising["ms_median"] is None
    assert raising["error"] == "RuntimeError: no kernel for this shape"
    assert right["ms_median"] > 0


def test_a_provider_that_raises_late_is_a_row():
    """The gate was passed, the timed calls fail."""

    class Tired(nn.BatchNorm2d):
        calls = 0

        def forward(self, x, residual=None):
            Tired.calls += 1
            if Tired.calls > 3:
                raise RuntimeError("out of something")
            return super().forward(x)

    (row,) = measured(Provider("tired", lambda _: Tired(32), FAMILIES))
    assert (row["ms_median"], row["error"]) == (None, "RuntimeError: out of something")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_right_providers_pass_the_gate(dtype, act, layout):
    """Ours and torch's, every op and fusion: what the gate refuses is wrong, not unlucky."""
    mine = [PROVIDERS[name] for name in ("reference", "native", "eager")]
    plan = small_plan(
        ops=OPS.values(), providers=mine, dtypes=[dtype], layouts=[layout], fusions=[(act, True)]
    )
    rows = run(dataclasses.replace(plan, repetitions=1)).rows
    assert len(rows) == len(OPS) * 2 + 2
    assert [row.get("error") for row in rows] == [None] * len(rows)


def test_no_rounding_is_mistaken_for_an_error_at_a_kink():
    """Where relu's argument is zero but for rounding, its slope is anyone's guess."""
    relu = case(act="relu", dtype="bfloat16", dims=(8, 32, 16, 16))
    inputs = operands.make(relu, "cpu", 0)
    assert inputs.dy.count_nonzero() > 0.99 * inputs.dy.numel()
    gate.truth(relu, inputs)
    kept = inputs.dy.count_nonzero() / inputs.dy.numel()
    assert 0.8 < kept < 0.99


def test_operands_are_what_they_say():
    for layout, fmt in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
        made = operands.make(case(layout=layout, residual=True, dtype="bfloat16"), "cpu", 1)
        for tensor in (made.x, made.dy, made.residual):
            assert tensor.shape == SMALL.dims
            assert tensor.dtype == torch.bfloat16
            assert tensor.is_contiguous(memory_format=fmt)
    again = operands.make(case(), "cpu", 1)
    assert torch.equal(again.x, operands.make(case(), "cpu", 1).x)
    assert not torch.equal(again.x, operands.make(case(), "cpu", 2).x)


def test_a_known_cost_is_measured_and_rounds_are_interleaved():
    order = []

    def sleeper(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return timing.Candidate([call])

    slow, fast = sleeper("slow", 0.02), sleeper("fast", 0.005)
    timing.time_cpu([slow, fast], 6)
    # A busy machine oversleeps now and then, never undersleeps.
    assert 0.005 <= min(fast.seconds) < 0.015
    assert 0.02 <= min(slow.seconds) < 0.03
    # One warm-up each, then rounds whose first place turns.
    assert order == ["slow", "fast"] * 2 + ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]


def test_summary_quantiles():
    summary = timing.summarize([i / 1000 for i in range(1, 102)])
    assert (summary.p10, summary.median, summary.p90) == pytest.approx((11, 51, 91))


def test_ring_exceeds_four_l2_or_says_warm():
    megabyte = 2**20
    assert timing.ring_size(50 * megabyte, 50 * megabyte) == (4, True)
    assert timing.ring_size(1000 * megabyte, 50 * megabyte) == (1, True)
    size, cold = timing.ring_size(1000, 50 * megabyte)
    assert size == timing.MAX_RING
    assert not cold


def test_rows_have_the_schema_and_the_file_is_whole_after_each_group(tmp_path):
    out = tmp_path / "deep" / "bench.json"
    seen = []

    def say(line):
        if line.startswith("["):
            seen.append(len(json.loads(out.read_text())["rows"]))

    log = run(small_plan(layouts=("nchw", "nhwc")), out, say=say)
    assert seen == [1, 2]
    header, rows = report.load(out)
    assert rows == log.rows
    assert [tuple(row) for row in rows] == [FIELDS] * 2
    assert not rows[0]["graph"]
    assert rows[0]["shape"] == [2, 32, 6, 4]
    assert rows[0]["gb_per_s"] == pytest.approx(rows[0]["min_bytes"] / rows[0]["ms_median"] / 1e6)
    needed = "device driver cuda torch triton cudnn clocks commit copy_gb_per_s threads"
    assert header.keys() >= set(needed.split())
    assert header["copy_gb_per_s"] > 0.1


def test_budget_stops_before_the_next_group(tmp_path):
    said = []
    out = tmp_path / "bench.json"
    run(small_plan(layouts=("nchw", "nhwc")), out, budget=0.0, say=said.append)
    assert report.load(out)[1] == []
    assert said == ["budget of 0 s spent: 2 of 2 groups left out"]


def test_gpu_providers_say_so_in_one_line_without_a_gpu(monkeypatch):
    monkeypatch.setattr(fusednorm, "available_backends", lambda: ("reference",))
    said = []
    rows = run(small_plan(providers=PROVIDERS.values(), repetitions=1), say=said.append).rows
    missing = [line for line in said if "not measured" in line]
    assert missing == [
        f"{name}: not measured, needs a CUDA GPU" for name in ("cuda", "triton", "cudnn")
    ]
    assert [row["provider"] for row in rows] == ["reference", "native", "compile", "eager"]


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("--op", "batch_group_norm[32]"),
        ("--provider", "cudnn"),
        ("--shapes", "detection"),
        ("--dtype", "bfloat16"),
        ("--layout", "nhwc"),
        ("--direction", "backward"),
        ("--act", "leaky_relu"),
    ],
)
def test_unknown_names_list_the_known(option, known, capsys, tmp_path):
    out = tmp_path / "bench.json"
    assert command.main(["run", "--out", str(out), option, "nonsense"]) == 2
    told = capsys.readouterr().err
    assert "unknown" in told
    assert "'nonsense'" in told
    assert known in told
    assert not out.exists()


def test_no_gpu_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["run", "--device", "cuda", "--out", str(tmp_path / "b.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_selection():
    assert [op.name for op in select_ops(["group_norm", "batch_norm"])] == [
        "batch_norm",
        "group_norm[32]",
    ]
    assert len(select_ops(["batch_group_norm"])) == 4
    assert len(select(["resnet50"])) == len(RESNET50) * 8
    assert select(["cpu", "cpu.step"]) == [BY_NAME["cpu.step"]]
    # 32 groups fit no 8 channels, and a matrix has one layout.
    groups = Plan([BY_NAME["tiny.a"], BY_NAME["odd.plain"]], directions=("both",)).groups()
    assert [(g[0].dims, g[0].layout) for g in groups] == [
        ((2, 8, 4, 4), "nchw"),
        ((2, 8, 4, 4), "nhwc"),
        ((1024, 768), "nchw"),
    ]
    assert "group_norm[32]" not in [c.op.name for c in groups[0]]


def test_command_line_end_to_end(tmp_path):
    """run, then report with both outputs, as a user would; an earlier file is kept."""
    out, page, picture = (tmp_path / name for name in ("b.json", "b.md", "b.png"))
    out.write_text("an hour of somebody's GPU")
    bench = [sys.executable, "-m", "fusednorm.bench"]
    options = "--shapes tiny.a --op batch_norm --provider native reference cudnn --device cpu "
    options += "--direction forward --dtype float32 --repetitions 5"
    done = subprocess.run(
        [*bench, "run", *options.split(), "--out", str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cudnn: not measured" in done.stdout
    assert "s left" in done.stdout
    assert (tmp_path / "b.before.json").read_text() == "an hour of somebody's GPU"
    done = subprocess.run(
        [*bench, "report", str(out), "--markdown", str(page), "--png", str(picture)],
        capture_output=True,
        text=True,
        check=True,
    )
    for text in (done.stdout, page.read_text()):
        assert "forward (2x8x4x4) float32 nhwc" in text
    assert "| batch_norm | reference |" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert command.main(["report", str(page)]) == 2


def test_report_shows_why_there_is_no_time():
    rows = measured(provider("raises"), PROVIDERS["native"])
    for text in (report.table(rows), "\n".join(report.cells(rows[0], {}))):
        assert "RuntimeError: no kernel for this shape" in text
    # The peer's ratio to itself.
    assert "1.00" in report.table(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "promised"), [("nchw", 1.5), ("nhwc", 3.0)])
def test_cpu_users_are_not_punished(layout, promised):
    """Forward + backward through the public module beside nn.BatchNorm2d, interleaved."""
    plan = Plan(
        shapes=select(["cpu"]),
        ops=select_ops(["batch_norm", "batch_group_norm"]),
        providers=[PROVIDERS["reference"], PROVIDERS["native"]],
        layouts=[layout],
        directions=("both",),
        repetitions=12,
    )
    tries: dict[str, list[float]] = {}
    # Three tries, the median of their ratios. A ratio is that of the medians or of the fast
    # deciles, whichever is lower: which allocations fault their pages in moves either by a half on
    # a shared machine, and a layer that is really too slow is so in both.
    for _ in range(3):
        rows = run(plan).rows
        assert [row.get("error") for row in rows] == [None] * len(rows)
        times = {(r["provider"], r["op"]): (r["ms_median"], r["ms_p10"]) for r in rows}
        peer = times["native", "batch_norm"]
        for (provider, op), ours in times.items():
            if provider == "reference":
                ratio = min(mine / theirs for mine, theirs in zip(ours, peer, strict=True))
                tries.setdefault(op, []).append(ratio)
    assert len(tries) == 5
    ratios = {op: statistics.median(r) for op, r in tries.items()}
    assert max(ratios.values()) <= promised, ratios


def test_dtypes_cover_the_package():
    assert set(DTYPES.values()) == {torch.float16, torch.bfloat16, torch.float32, torch.float64}

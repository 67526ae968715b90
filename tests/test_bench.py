"""Benchmarks worth believing: exact before timed, failures are rows, the CPU promise holds."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from fusednorm.bench import gate, operands, papers, plain, timing
from fusednorm.bench.providers import PROVIDERS, Provider
from fusednorm.bench.registry import (
    ACTIVATIONS,
    DTYPES,
    FAMILIES,
    FUSIONS,
    OPS,
    Family,
    Op,
    fusion_name,
    min_bytes,
    select_ops,
)
from fusednorm.bench.run import Plan
from fusednorm.bench.shapes import BY_NAME, RESNET50, SETS, select
from torch import nn
from torch.nn import functional as F

import fusednorm
from bench_cases import SMALL, case, measured, rows_of, small_plan, wrong

PLAIN = [op for op in OPS.values() if op.family in ("batch_norm", "batch_group_norm", "group_norm")]
OTHERS = [op for op in OPS.values() if op not in PLAIN]


@pytest.fixture(autouse=True)
def as_users_run(poisoned, monkeypatch):
    """Filling every fresh tensor would be timed too; the copy takes seconds in every process."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda device: 10.0)


@pytest.mark.parametrize(
    "op, dims",
    [
        pytest.param(op, dims, id=f"{op.name}-{'x'.join(map(str, dims))}")
        for op in PLAIN
        for dims in ((4, 32, 6, 5), (4, 32), (3, 32, 2, 3, 5))
        if not op.misfit(dims)
    ],
)
def test_float64_truth_is_pytorchs(op, dims):
    """The composition that judges everyone agrees with torch's own kernels to rounding."""
    groups = op.num_groups(dims)
    judge = plain.judge(case(op.name, dims=dims))
    judge = operands.prepare(judge, "cpu").double()
    x = torch.randn(dims, dtype=torch.float64) + 2
    affine = (judge.weight, judge.bias)
    if op.per_sample:
        expected = F.group_norm(x, groups, *affine)
    else:
        mean, var = torch.zeros(groups).double(), torch.ones(groups).double()
        flat = F.batch_norm(x.reshape(len(x), groups, -1), mean, var, training=True).view(dims)
        weight, bias = (p.view(-1, *(1,) * (len(dims) - 2)) for p in affine)
        expected = flat * weight + bias
    torch.testing.assert_close(judge(x), expected, rtol=1e-12, atol=1e-12)
    if not op.per_sample:
        torch.testing.assert_close(judge.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(judge.running_var, var, rtol=1e-12, atol=1e-12)


def test_min_bytes():
    size = SMALL.numel * 4
    unfused = {d: min_bytes(case(direction=d)) for d in ("forward", "backward", "both")}
    assert unfused == {"forward": 2 * size, "backward": 3 * size, "both": 5 * size}
    fused = case(direction="backward", residual=True)
    assert min_bytes(fused) == 3 * size
    # dresidual is written; relu needs a bit an element, gelu the residual itself.
    assert min_bytes(dataclasses.replace(fused, act="relu")) == 4 * size + SMALL.numel // 8
    assert min_bytes(dataclasses.replace(fused, act="gelu")) == 5 * size
    assert min_bytes(case(direction="forward", residual=True, dtype="bfloat16")) == 3 * size // 2
    # The style is read, too.
    assert min_bytes(case("sandwich_adain", direction="forward")) == 3 * size


@pytest.mark.parametrize(
    ("defect", "named"),
    [
        ("one element", "error of y"),
        ("nan", "error of y inf"),
        ("dtype", "y is torch.float64"),
        ("dx", "error of dx"),
        ("dweight", "error of dweight"),
        ("dbias", "error of dbias"),
        ("running_var", "error of running_var"),
    ],
)
def test_a_wrong_provider_gets_no_time(defect, named):
    right, refused = measured(wrong(None), wrong(defect))
    assert right["ms_median"] > 0
    assert right["error"] is None
    assert refused["ms_median"] is refused["gb_per_s"] is refused["pct_copy"] is None
    assert named in refused["error"]
    assert refused["error"].startswith("refused a time")


def test_a_provider_that_raises_is_a_row():
    raising, right = measured(wrong("raises"), wrong(None))
    assert raising["ms_median"] is None
    assert raising["error"] == "RuntimeError: no kernel for this shape"
    assert right["ms_median"] > 0


def test_a_provider_that_raises_late_is_a_row():
    """The gate was passed, the timed calls fail."""

    class Tired(nn.BatchNorm2d):
        calls = 0

        def forward(self, x, residual=None):
            Tired.calls += 1
            if Tired.calls > 4:
                raise RuntimeError("out of something")
            return super().forward(x)

    (row,) = measured(Provider("tired", lambda _: Tired(32)))
    assert (row["ms_median"], row["error"]) == (None, "RuntimeError: out of something")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_right_providers_pass_the_gate(dtype, act, layout):
    """Ours and torch's, every op and fusion: what the gate refuses is wrong, not unlucky."""
    mine = [PROVIDERS[name] for name in ("reference", "native", "eager")]
    plan = small_plan(
        ops=PLAIN, providers=mine, dtypes=[dtype], layouts=[layout], fusions=[(act, True)]
    )
    rows = rows_of(dataclasses.replace(plan, repetitions=1))
    assert len(rows) == len(PLAIN) * 2 + 2
    assert [row["error"] for row in rows] == [None] * len(rows)


@pytest.mark.parametrize("op", OTHERS, ids=lambda op: op.name)
def test_compositions_of_the_papers_pass_the_gate(op):
    """With their extra operands, histories full, activations where they belong."""
    plan = small_plan(
        ops=[op],
        providers=[PROVIDERS["eager"]],
        dtypes=["float32", "bfloat16"],
        layouts=["nchw", "nhwc"],
        directions=["forward", "backward", "both"],
        fusions=[(None, False), ("relu", False)],
        repetitions=1,
    )
    rows = rows_of(plan)
    assert len(rows) == 24
    assert [row["error"] for row in rows] == [None] * 24
    # A gradient that vanishes is not a number of its own.
    assert all(row["max_err"] < 0.05 for row in rows)


def test_pytorchs_own_norm_is_asked_as_networks_do():
    """The sum and relu of a residual block in place: out of place each would cost it memory."""
    norm = plain.torch_norm(case(act="relu", residual=True))
    written = []
    norm.norm.register_forward_hook(lambda _, inputs, y: written.append(y.data_ptr()))
    x, residual = torch.randn(2, 2, 32, 6, 4)
    assert norm(x, residual).data_ptr() == written[0]
    assert (norm(x, residual) >= 0).all()


def test_a_history_is_full_before_the_gate_and_the_clock():
    """Memory of past batches changes y: filled the same way, it is the same in float64."""
    memorized = case("memorized_batch_norm")
    made = [operands.make(memorized, "cpu", seed) for seed in range(3)]
    empty, full = (gate.truth(memorized, made[0], past) for past in ([], made[1:]))
    assert gate.error(empty["y"], full["y"]) > 1e-3
    assert papers.WARM_UP["memorized_batch_norm"] == 4


def test_no_rounding_is_mistaken_for_an_error_at_a_kink():
    """Where relu's argument is zero but for rounding, its slope is anyone's guess."""
    for op in ("batch_norm", "proxy_norm[32]"):
        relu = case(op, act="relu", dtype="bfloat16", dims=(8, 32, 16, 16))
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


def test_a_family_is_one_entry(monkeypatch):
    """A method nobody has fused yet: its composition is measured, its class missed in one row."""
    monkeypatch.setitem(FAMILIES, "next_norm", Family("next_norm", "NextNorm", residual=False))
    monkeypatch.setitem(papers.PAPERS, "next_norm", lambda case: nn.BatchNorm2d(case.dims[1]))
    providers = [
        dataclasses.replace(PROVIDERS[name], families=tuple(FAMILIES))
        for name in ("reference", "eager")
    ]
    plan = small_plan(
        ops=[OPS["batch_norm"], Op("next_norm")],
        providers=providers,
        fusions=[(None, False), (None, True)],
        layouts=["nchw", "nhwc"],
    )
    rows = [row for row in rows_of(plan) if row["op"] == "next_norm"]
    assert [(r["provider"], r["layout"], r["residual"], r["error"]) for r in rows] == [
        ("reference", "nchw", False, "not in this version: fusednorm.NextNorm"),
        ("eager", "nchw", False, None),
        ("eager", "nhwc", False, None),
    ]
    monkeypatch.setattr(
        fusednorm, "NextNorm", lambda channels: nn.BatchNorm2d(channels), raising=False
    )
    rows = [row for row in rows_of(plan) if row["op"] == "next_norm"]
    assert [row["error"] for row in rows] == [None] * 4


def test_gpu_providers_say_so_in_one_line_without_a_gpu(monkeypatch):
    from fusednorm.bench.run import usable

    monkeypatch.setattr(fusednorm, "available_backends", lambda: ("reference",))
    said = []
    found = usable(small_plan(providers=PROVIDERS.values()), said.append)
    gpu = ("cuda", "triton", "cudnn", "compile-cooperative", "apex", "cudnn-frontend")
    assert said == [f"{name}: not measured, needs a CUDA GPU" for name in gpu]
    assert [provider.name for provider in found] == [n for n in PROVIDERS if n not in gpu]


def test_selection():
    assert [op.name for op in select_ops(["group_norm", "batch_norm"])] == [
        "batch_norm",
        "group_norm[32]",
    ]
    assert len(select_ops(["batch_group_norm"])) == 4
    assert len(select(["resnet50"])) == len(RESNET50) * 8
    assert select(["cpu", "cpu.step"]) == [BY_NAME["cpu.step"]]
    assert all(len(shape.dims) == 5 for shape in SETS["3d"])
    # 32 groups fit no 8 channels, and a matrix has one layout.
    groups = Plan([BY_NAME["tiny.a"], BY_NAME["odd.plain"]], directions=("both",)).groups()
    assert [(g[0].dims, g[0].layout) for g in groups] == [
        ((2, 8, 4, 4), "nchw"),
        ((2, 8, 4, 4), "nhwc"),
        ((1024, 768), "nchw"),
    ]
    assert "group_norm[32]" not in [c.op.name for c in groups[0]]
    # What takes images only, or no residual, isn't asked for anything else.
    assert {c.op.family for c in groups[2]} == {"batch_norm", "batch_group_norm", "group_norm"}
    added = Plan([BY_NAME["tiny.b"]], fusions=[(None, True)]).groups()[0]
    assert not {c.op.family for c in added} & {"proxy_norm", "sandwich_adain"}


def test_fusions_have_names():
    assert fusion_name(None, False) == "none"
    assert fusion_name("relu", True) == "residual+relu"
    assert FUSIONS["residual+silu"] == ("silu", True)
    assert len(FUSIONS) == 2 * len(ACTIVATIONS)


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
        rows = rows_of(plan)
        assert [row["error"] for row in rows] == [None] * len(rows)
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

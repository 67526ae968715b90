"""End-to-end rows: torchvision's network, norms exchanged one for one, exact before fast."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from fusednorm.bench import papers, steps, variants
from fusednorm.bench.registry import FAMILIES
from fusednorm.bench.resnet import PARAMETERS, ResNet50, Unfused, eval_affine, fold
from fusednorm.bench.results import FIELDS, key
from torch import nn

import fusednorm
from models import torchvision

BATCH_NORM = variants.VARIANTS["resnet50[batch_norm]"]
PLAN = steps.StepPlan(
    "cpu",
    variants=["resnet50[batch_norm]"],
    batches=[2],
    side=32,
    formats=["nchw-fp32"],
    directions=["train"],
    repetitions=3,
    seconds_per_group=0.0,
)


@pytest.fixture(autouse=True)
def as_users_run(poisoned):
    """Filling every fresh tensor takes seconds in a network."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture(autouse=True)
def forgotten():
    """What the gate found about classes that a test replaced."""
    yield
    steps._errors.cache_clear()


def plan(**changes):
    return dataclasses.replace(PLAN, **changes)


def measured(**changes):
    (job,) = steps.jobs(plan(**changes))
    return {(row["op"], row["provider"]): row for row in job.measure(job.rows)}


def batch_norms(channels, act, residual):
    return Unfused(nn.BatchNorm2d(channels), act)


def test_it_is_torchvisions_network():
    """The same parameters, and with the same values the same outputs, to the last bit."""
    theirs = torchvision().models.resnet50().double()
    mine = ResNet50(batch_norms).double()
    assert sum(p.numel() for p in mine.parameters()) == PARAMETERS
    values = theirs.state_dict().values()
    mine.load_state_dict(dict(zip(mine.state_dict(), values, strict=True)))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        assert torch.equal(mine.train(mode)(images), theirs.train(mode)(images)), mode


def test_it_starts_as_torchvision_does():
    theirs, mine = torchvision().models.resnet50(), ResNet50(batch_norms)
    for (name, a), b in zip(theirs.named_parameters(), mine.parameters(), strict=True):
        a, b = a.detach(), b.detach()
        spread = float(b.std()) / b.numel() ** 0.5
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.1), name
        assert float(a.mean()) == pytest.approx(float(b.mean()), abs=7 * spread), name


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_plain_network_trains(name):
    """Loss falls on one batch, and its weights move; so do running statistics."""
    op = variants.VARIANTS[name]
    model = variants.network(op, steps.plain(op), "nchw-fp32", "cpu")
    images, labels = variants.images_and_labels(4, 32, "nchw-fp32", "cpu")
    step = variants.train_call(
        model, images, labels, "nchw-fp32", twice=op.family == "memorized_batch_norm"
    )
    before = [p.detach().clone() for p in model.parameters()]
    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0]
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(moved)
    assert all(p.grad is None for p in model.parameters())


def test_memorized_steps_replace_what_they_pushed():
    """The second forward sees the moved weights: newest memory and live batch differ."""
    op = variants.VARIANTS["resnet50[memorized_batch_norm]"]
    found = {}
    for twice in (False, True):
        model = variants.network(op, "eager", "nchw-fp32", "cpu")
        data = variants.images_and_labels(4, 32, "nchw-fp32", "cpu")
        step = variants.train_call(model, *data, "nchw-fp32", twice)
        step()
        stem = model.stem.norm.norm
        assert int(stem.fill) == 1
        found[twice] = stem.memory_mean[0].clone(), stem.running_mean.clone()
    assert not torch.equal(found[True][0], found[False][0])
    assert torch.equal(found[True][1], found[False][1])


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_folding(name):
    """Same logits in float64 without a norm left; norms that depend on the input are refused."""
    op = variants.VARIANTS[name]
    model = variants.network(op, steps.plain(op), None, "cpu")
    images, _ = variants.images_and_labels(4, 64, None, "cpu")
    for _ in range(2):
        variants.infer_call(model, images, None)()
    expected = variants.infer_call(model.eval(), images, None)()
    if op.family not in variants.FOLDABLE:
        with pytest.raises(ValueError, match="not affine in evaluation"):
            fold(model)
        return
    folded = fold(model)
    got = variants.infer_call(folded, images, None)()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    names = {type(module).__name__ for module in folded.modules()}
    assert names == {
        "ResNet50", "ConvNorm", "Bottleneck", "Unfused", "Conv2d", "Identity", "Linear",
        "Sequential",
    }  # fmt: skip


def test_groups_that_cut_channels_do_not_fold():
    with pytest.raises(ValueError, match="3 groups cut 8 channels"):
        eval_affine(papers.BatchGroupNorm(8, 3))


def test_our_networks_fold_too():
    model = variants.network(BATCH_NORM, "reference", None, "cpu")
    images, _ = variants.images_and_labels(4, 64, None, "cpu")
    variants.infer_call(model, images, None)()
    expected = variants.infer_call(model.eval(), images, None)()
    got = variants.infer_call(fold(model), images, None)()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def test_rows():
    rows = measured(providers=["native", "reference"], directions=["train"])
    assert rows.keys() == {(name, who) for name in PLAN.variants for who in ("native", "reference")}
    for row in rows.values():
        assert tuple(row) == FIELDS
        assert row["error"] is None
        assert row["kind"] == "step"
        assert row["shape"] == [2, 3, 32, 32]
        assert row["repetitions"] == 3
        assert row["images_per_s"] == pytest.approx(2 / row["ms_median"] * 1e3)
        assert row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert 0 < row["max_err"] < 1e-4
        assert (row["graph"], row["cold"], row["peak_bytes"], row["gb_per_s"]) == (
            False, False, None, None,
        )  # fmt: skip


def test_jobs():
    """One group a direction, format and batch; folded networks have no norm to tell apart."""
    said = []
    found = steps.jobs(steps.StepPlan("cpu"), said.append)
    assert len(found) == 3 * 2 * 4
    assert said == [
        f"{name}: not measured, needs a CUDA GPU" for name in ("cudnn", "cuda", "triton")
    ]
    keys = [key(row) for job in found for row in job.rows]
    assert len(set(keys)) == len(keys)
    for job in found:
        for row in job.rows:
            op = variants.VARIANTS[row["op"]]
            if row["direction"] == "infer_folded":
                assert row["provider"] == steps.plain(op)
                assert op.family in variants.FOLDABLE
    (bf16,) = {job.rows[0]["layout"] for job in found if job.rows[0]["dtype"] == "bfloat16"}
    assert bf16 == "nhwc"


def test_a_class_that_is_missing_is_told_once(monkeypatch):
    monkeypatch.delattr(fusednorm, "BatchGroupNorm")
    name = "resnet50[batch_group_norm[32]]"
    found = steps.jobs(plan(variants=[name], batches=[2, 8], providers=["reference"]))
    assert len(found) == 1
    (row,) = found[0].measure(found[0].rows)
    assert row["error"] == "not in this version: fusednorm.BatchGroupNorm"
    assert row["ms_median"] is None


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("variants", "resnet50[proxy_norm[32]]"),
        ("providers", "eager"),
        ("formats", "nhwc-bf16"),
        ("directions", "infer_folded"),
    ],
)
def test_unknown_names_list_the_known(field, known):
    with pytest.raises(ValueError, match="unknown .*'nonsense'; known: ") as caught:
        plan(**{field: ["nonsense"]})
    assert known in str(caught.value)


class WrongForward(fusednorm.BatchNorm):
    def forward(self, input, residual=None):
        return super().forward(input, residual) * 1.01


class WrongBackward(fusednorm.BatchNorm):
    """Right values; of the gradient, what the statistics carry is lost."""

    def forward(self, input, residual=None):
        mean = input.mean((0, 2, 3), keepdim=True).detach()
        var = input.var((0, 2, 3), keepdim=True, unbiased=False).detach()
        z = (input - mean) / (var + self.eps).sqrt() * self.weight.view(1, -1, 1, 1)
        z = z + self.bias.view(1, -1, 1, 1)
        return torch.relu(z if residual is None else z + residual) if self.act else z


class WrongEvaluation(fusednorm.BatchNorm):
    def forward(self, input, residual=None):
        y = super().forward(input, residual)
        return y if self.training else y + 0.1


class Raising(fusednorm.BatchNorm):
    def forward(self, input, residual=None):
        raise RuntimeError("no kernel for this shape\nand a long trace")


@pytest.mark.parametrize(
    ("broken", "direction", "said"),
    [
        (WrongForward, "train", "refused a time: error of logits"),
        (WrongBackward, "train", "refused a time: error of dstem"),
        (WrongEvaluation, "infer", "refused a time: error of logits"),
        (Raising, "train", "RuntimeError: no kernel for this shape"),
    ],
)
def test_a_wrong_norm_gets_no_time(monkeypatch, broken, direction, said):
    monkeypatch.setattr(fusednorm, "BatchNorm", broken)
    rows = measured(providers=["native", "reference"], directions=[direction])
    wrong = rows["resnet50[batch_norm]", "reference"]
    assert wrong["error"].startswith(said)
    assert wrong["ms_median"] is wrong["images_per_s"] is None
    assert rows["resnet50[batch_norm]", "native"]["error"] is None


class Later(papers.MemorizedBatchNorm):
    """A class as fusednorm will have it: activation and residual fused."""

    def __init__(self, num_features: int, *, act: str | None = None) -> None:
        super().__init__(num_features, act)

    def forward(self, input, residual=None):
        return super().forward(input, residual)


class LaterCross(papers.CrossIterationBatchNorm):
    """Called with the convolution and its input; no residual."""

    def __init__(self, num_features: int, *, act: str | None = None) -> None:
        super().__init__(num_features, act)

    def forward(self, y, conv_input, conv):
        assert isinstance(conv, nn.Conv2d)
        return super().forward(y, conv_input, conv)


@pytest.mark.parametrize(
    ("family", "later"),
    [("memorized_batch_norm", Later), ("cross_iteration_batch_norm", LaterCross)],
)
def test_later_classes_join_by_their_name(monkeypatch, family, later):
    """What fusednorm does not have yet is measured on the day it does, unfused where it must be."""
    kind = FAMILIES[family].fused
    monkeypatch.setattr(steps, "WARM_UP", 1)
    monkeypatch.setattr(fusednorm, kind, later, raising=False)
    name = f"resnet50[{family}]"
    rows = measured(variants=[name], providers=["reference", "eager"])
    assert [row["error"] for row in rows.values()] == [None, None]
    make = variants.factory(variants.VARIANTS[name], "reference")
    with_residual = make(8, "relu", True)
    assert isinstance(with_residual, later) == (family == "memorized_batch_norm")
    assert isinstance(make(8, "relu", False), later)
    assert isinstance(with_residual, Unfused) or not with_residual.wants_conv


def test_ours_double_forward_is_used(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def double_forward(model):
        seen.append(model)
        yield

    monkeypatch.setattr(fusednorm, "double_forward", double_forward, raising=False)
    model = nn.Sequential(papers.MemorizedBatchNorm(4))
    with variants.second_forward(model):
        assert model[0].second
        assert not torch.is_grad_enabled()
    assert seen == [model]
    assert not model[0].second


@pytest.mark.parametrize("form", variants.FORMATS)
def test_formats(form):
    """Parameters stay fp32 for training; for inference the convolutions' are the format's."""
    make = functools.partial(variants.network, BATCH_NORM, "native", form, "cpu")
    images, _ = variants.images_and_labels(2, 32, form, "cpu")
    dtype, layout = variants.FORMATS[form]
    assert images.dtype == getattr(torch, dtype)
    last = layout == "nhwc"
    assert images.is_contiguous(memory_format=torch.channels_last) == last
    model = make()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    seen = []
    model.stem.norm.register_forward_hook(lambda _, inputs, y: seen.extend((*inputs, y)))
    variants.infer_call(model, images, form)()
    assert {y.dtype for y in seen} == {getattr(torch, dtype)}
    assert all(y.is_contiguous(memory_format=torch.channels_last) == last for y in seen)
    model = variants.for_inference(model, form, folded=False)
    assert model.stem.conv.weight.dtype == getattr(torch, dtype)
    assert model.stem.norm.norm.weight.dtype == torch.float32


class FakeGraph:
    """Records the call inside `torch.cuda.graph`, as far as Python can tell."""

    replayed = 0

    def replay(self):
        FakeGraph.replayed += 1


@pytest.mark.parametrize(
    ("capturable", "breaks", "graph"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_calls_on_a_gpu(monkeypatch, capturable, breaks, graph):
    """Graph where it can be, eager else; the device is waited for; nothing replayed is freed."""
    waits, FakeGraph.replayed = [], 0

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        yield
        if breaks:
            raise RuntimeError("operation not permitted when stream is capturing")

    for name, fake in {
        "synchronize": lambda: waits.append(1),
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 700,
        "current_stream": lambda: None,
        "CUDAGraph": FakeGraph,
        "graph_pool_handle": lambda: "another",
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    calls, module = [], nn.Linear(1, 1)
    entry = steps._Entry({})
    alive = weakref.ref(module)

    def call(module=module):
        calls.append(1)

    pools = ["first"]
    timed = steps._on_gpu(entry, call, 200, capturable, pools)
    # The allocator takes no second capture into a pool whose capture failed.
    assert pools == ["first", *["another"] * breaks]
    del call, module
    gc.collect()
    assert alive() is not None
    assert entry.peak_bytes == 500
    assert entry.graph == graph
    calls.clear(), waits.clear()
    timed()
    assert (FakeGraph.replayed, len(calls)) == ((1, 0) if graph else (0, 1))
    assert waits

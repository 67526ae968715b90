"""End to end: ResNet-50's training step and inference, the norm exchanged and nothing else.

A training step is forward, cross entropy, backward and an SGD step with momentum; memorized norms
add their second forward. All variants of a direction, format and batch size start from the same
weights, are compared with float64 on a small problem, and are then timed in turns: wall clock,
from the first launch until the device is done. On a GPU a step is replayed from a CUDA graph where
it can be captured; the row's `graph` tells. Peak memory is all that a variant brings: network,
gradients, momentum, history and activations.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gate, papers, timing
from .providers import PROVIDERS
from .registry import FAMILIES, Op, choose
from .resnet import Bottleneck, ResNet50, bare
from .results import FIELDS, Job, Row
from .variants import (
    FORMATS,
    OURS,
    VARIANTS,
    autocast,
    for_inference,
    fused_class,
    images_and_labels,
    infer_call,
    network,
    providers,
    switch,
    train_call,
)

DIRECTIONS = ("train", "infer", "infer_folded")
BATCHES = (2, 8, 32, 128)
SIDE = 224
STEP_PROVIDERS = ("cudnn", "native", *OURS, "eager")
# Steps before timing: histories are full, cuDNN has chosen, momentum exists.
WARM_UP = 5
# The gate's own, small problem.
GATE_BATCH, GATE_SIDE = 4, 64
# A relu whose argument is zero but for rounding moves the stem's gradient by up to 1e-2 of its
# largest value in fp32, and by half of it in bf16; a wrong term in one norm moves it by tenths.
STEM_BOUND = 0.05


@dataclass(frozen=True)
class StepPlan:
    """What to measure; `variants` are names of `VARIANTS`, `formats` of `FORMATS`."""

    device: str
    variants: Sequence[str] = tuple(VARIANTS)
    providers: Sequence[str] = STEP_PROVIDERS
    batches: Sequence[int] = BATCHES
    side: int = SIDE
    formats: Sequence[str] = tuple(FORMATS)
    directions: Sequence[str] = DIRECTIONS
    repetitions: int = timing.MIN_REPETITIONS
    # Seconds a group may be timed for; no fewer than five repetitions each.
    seconds_per_group: float = 30.0

    def __post_init__(self) -> None:
        choose("variant", self.variants, [*VARIANTS])
        choose("step provider", self.providers, STEP_PROVIDERS)
        choose("format", self.formats, [*FORMATS])
        choose("step direction", self.directions, DIRECTIONS)

    @classmethod
    def quick(cls, device: str, **changes: Any) -> StepPlan:
        """Some ten seconds' worth: one group, on the CPU of two norms and tiny images."""
        few: dict[str, Any] = {"formats": ("nhwc-bf16",), "batches": (32,)}
        if device == "cpu":
            few = {"formats": ("nchw-fp32",), "batches": (2,), "side": 32}
            few["variants"] = tuple(VARIANTS)[:2]
        few |= {"directions": ("train",), "seconds_per_group": 6.0}
        return cls(device, **(few | changes))


def plain(op: Op) -> str:
    """The provider that computes the op in plain PyTorch, on any device."""
    return "native" if op.family == "batch_norm" else "eager"


def _gate_network(op: Op, provider: str, form: str | None, device: str) -> ResNet50:
    """With quarter scales at the blocks' ends: at one, 53 untrained norms over a small batch
    amplify bf16's rounding to a third of the logits, and no bound would mean anything."""
    model = network(op, provider, form, device)
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, Bottleneck):
                bare(block.three.norm).weight.fill_(0.25)
    return model


def _results(
    op: Op, provider: str, form: str | None, direction: str, device: str
) -> dict[str, Tensor]:
    """The first training step's logits and gradients from both ends, or evaluation's logits."""
    model = _gate_network(op, provider, form, device)
    images, labels = images_and_labels(GATE_BATCH, GATE_SIDE, form, device)
    # TF32 would flip relus as bf16 does.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, switch(provider) if form else nullcontext():
        if direction != "train":
            for _ in range(2):
                # Running statistics and memory other than at the start.
                infer_call(model, images, form)()
            model = for_inference(model, form, direction == "infer_folded")
            return {"logits": infer_call(model, images, form)()}
        with autocast(form, device):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        wanted = {"dhead": model.head.weight, "dstem": model.stem.conv.weight}
        found = torch.autograd.grad(loss, [*wanted.values()])
    return {"logits": logits.detach()} | dict(zip(wanted, found, strict=True))


@functools.cache
def _errors(op: Op, provider: str, form: str, direction: str, device: str) -> dict[str, float]:
    """Against float64's plain composition; a folded network's against the unfolded one."""
    found = _results(op, provider, form, direction, device)
    truth = _truth(op, "train" if direction == "train" else "infer", device)
    return {name: gate.error(found[name], truth[name]) for name in truth}


@functools.cache
def _truth(op: Op, direction: str, device: str) -> dict[str, Tensor]:
    return _results(op, plain(op), None, direction, device)


def check(op: Op, provider: str, form: str, direction: str, device: str) -> gate.Verdict:
    """Logits and the head's gradient within the gate's bounds of the plain composition's error in
    the format; the stem's gradient, which has seen every layer's backward, in fp32 without TF32.
    """
    same = "train" if direction == "train" else "infer"
    own = _errors(op, plain(op), form, same, device)
    found = _errors(op, provider, form, direction, device)
    eps = torch.finfo(getattr(torch, FORMATS[form][0])).eps
    judged = [name for name in found if name != "dstem"]
    refusal = None
    for name in judged:
        allowed = gate.FACTOR * own[name] + gate.FLOOR * eps
        if not found[name] <= allowed:
            refusal = refusal or (
                f"refused a time: error of {name} {found[name]:.1e} exceeds {allowed:.1e} "
                f"({gate.FACTOR:g} x plain torch's {own[name]:.1e} + {gate.FLOOR:g} eps)"
            )
    if direction == "train":
        error = _errors(op, provider, "nchw-fp32", direction, device)["dstem"]
        if not error <= STEM_BOUND:
            refusal = refusal or (
                f"refused a time: error of dstem in fp32 {error:.1e} exceeds {STEM_BOUND:g}"
            )
    worst, torchs = (max(errors[name] for name in judged) for errors in (found, own))
    return gate.Verdict(worst, torchs, refusal)


@dataclass
class _Entry:
    """A row in the making."""

    row: Row
    verdict: gate.Verdict | None = None
    candidate: timing.Candidate | None = None
    graph: bool = False
    peak_bytes: int | None = None
    # A graph replays addresses; the network and the optimizer that own them have to stay.
    keep: object = None


def _capture(call: Callable[[], object], pools: list[Any]) -> Callable[[], None] | None:
    """A call's graph, or None where it cannot be captured.

    One memory pool, the last of `pools`, serves all graphs: they run one after the other, and what
    outlives a step, parameters, momentum and buffers, was allocated before.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pools[-1], stream=torch.cuda.current_stream()):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        # That pool counts as being recorded to for ever, and nobody else could be captured.
        pools.append(torch.cuda.graph_pool_handle())
        return None
    replay: Callable[[], None] = graph.replay
    return replay


def _waited(call: Callable[[], object]) -> Callable[[], None]:
    """The call until its end on the device, which the wall clock has to see."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def _on_gpu(
    entry: _Entry, call: Callable[[], object], before: int, capturable: bool, pools: list[Any]
) -> Callable[[], None]:
    """The warm call as it is timed there; notes its memory and whether it is a graph."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    entry.peak_bytes = torch.cuda.max_memory_allocated() - before
    replay = _capture(call, pools) if capturable else None
    entry.graph, entry.keep = replay is not None, call
    return _waited(replay or call)


def _make(entry: _Entry, form: str, images: Tensor, labels: Tensor, pools: list[Any]) -> None:
    """Checks, builds and warms up one variant, and captures it where that can be."""
    row, device = entry.row, images.device.type
    op, provider, direction = VARIANTS[row["op"]], row["provider"], row["direction"]
    entry.verdict = check(op, provider, form, direction, device)
    if entry.verdict.refusal:
        row["error"] = entry.verdict.refusal
        return
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    model = network(op, provider, form, device)
    call: Callable[[], object]
    if direction == "train":
        call = train_call(model, images, labels, form, op.family == "memorized_batch_norm")
        capturable = papers.capturable(model)
    else:
        # Memory of past batches must not be empty.
        infer_call(model, images, form)()
        call = infer_call(for_inference(model, form, direction == "infer_folded"), images, form)
        capturable = True
    # On the CPU only histories have to fill, which others do not have.
    history = op.family in papers.WARM_UP and direction == "train"
    for _ in range(WARM_UP if device == "cuda" or history else 1):
        call()
    if device == "cuda":
        call = _on_gpu(entry, call, before, capturable, pools)
    entry.candidate = timing.Candidate([call], lambda: switch(provider))


def _finish(entry: _Entry) -> Row:
    row: Row = dict.fromkeys(FIELDS) | entry.row | {"graph": entry.graph}
    row["peak_bytes"] = entry.peak_bytes
    if entry.verdict is not None:
        row |= {"max_err": entry.verdict.max_err, "ref_err": entry.verdict.ref_err}
    candidate = entry.candidate
    if candidate is None:
        return row
    row["error"] = candidate.error
    if candidate.error is None:
        times = timing.summarize(candidate.seconds)
        row |= {
            "ms_p10": times.p10, "ms_median": times.median, "ms_p90": times.p90,
            "repetitions": len(candidate.seconds),
            "images_per_s": row["shape"][0] / times.median * 1e3,
        }  # fmt: skip
    return row


def measure(plan: StepPlan, form: str, wanted: Sequence[Row]) -> list[Row]:
    """The rows of one group, complete: timed in turns, or with the reason why not."""
    entries = [_Entry(dict(row)) for row in wanted]
    batch, _, side, _ = wanted[0]["shape"]
    on_gpu = plan.device == "cuda"
    images, labels = images_and_labels(batch, side, form, plan.device)
    stream: Any = torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext()
    pools = [torch.cuda.graph_pool_handle()] if on_gpu else []
    # Sizes never change here, so cuDNN may choose its convolutions by measuring.
    with stream, torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for entry in entries:
            op, provider = VARIANTS[entry.row["op"]], entry.row["provider"]
            if provider in OURS and fused_class(op.family) is None:
                entry.row["error"] = f"not in this version: fusednorm.{FAMILIES[op.family].fused}"
                continue
            try:
                with switch(provider):
                    _make(entry, form, images, labels, pools)
            except Exception as exception:  # out of memory, say: a row that tells
                entry.row["error"] = timing.describe(exception)
        ready = [entry.candidate for entry in entries if entry.candidate is not None]
        timing.time_cpu(ready, plan.repetitions, plan.seconds_per_group)
    rows = [_finish(entry) for entry in entries]
    del entries, ready, images, labels
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return rows


def _identity(plan: StepPlan, name: str, provider: str, direction: str, form: str, n: int) -> Row:
    dtype, layout = FORMATS[form]
    on_gpu = plan.device == "cuda"
    return {
        "kind": "step", "op": name, "provider": provider, "direction": direction,
        "shape": [n, 3, plan.side, plan.side], "dtype": dtype, "layout": layout,
        "act": None, "residual": False, "graph": on_gpu,
        # Weights, gradients and momentum, 306 MB, go through L2 in a training step.
        "cold": on_gpu and direction == "train",
    }  # fmt: skip


def jobs(plan: StepPlan, say: Callable[[str], None] = lambda line: None) -> list[Job]:
    """One job a direction, format and batch size; `say` hears of providers that are left out.

    A class that this version of fusednorm lacks is a row of the first job only.
    """
    here = []
    for name in plan.providers:
        if (reason := PROVIDERS[name].missing(plan.device)) is None:
            here.append(name)
        else:
            say(f"{name}: not measured, {reason}")
    found: list[Job] = []
    told: set[tuple[str, str]] = set()
    for direction, form, batch in itertools.product(plan.directions, plan.formats, plan.batches):
        rows = []
        for name in plan.variants:
            op = VARIANTS[name]
            for provider in providers(op, direction):
                if provider not in here or (name, provider) in told:
                    continue
                if provider in OURS and fused_class(op.family) is None:
                    told.add((name, provider))
                rows.append(_identity(plan, name, provider, direction, form, batch))
        if rows:
            title = f"resnet50 {direction}, {form}, batch {batch}"
            found.append(Job(title, rows, functools.partial(measure, plan, form)))
    return found

"""From cases to rows: check, time side by side, write down at once.

A group is all ops and providers on one shape, dtype, layout, direction and fusion; they share their
operands and are timed in turns, which is what makes their ratio worth reading.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import gate, machine, operands, timing
from .registry import OPS, PROVIDERS, Case, Op, Provider, min_bytes, title
from .shapes import Shape

Row = dict[str, Any]
# fmt: off
FIELDS = (
    "op", "provider", "direction", "shape", "dtype", "layout", "act", "residual", "graph", "cold",
    "ms_p10", "ms_median", "ms_p90", "min_bytes", "gb_per_s", "pct_copy", "nodes", "kernels",
    "max_err", "ref_err",
)
# fmt: on


@dataclass(frozen=True)
class Plan:
    """What to measure; the product of its lists, short of what does not fit together."""

    shapes: Sequence[Shape]
    ops: Sequence[Op] = tuple(OPS.values())
    providers: Sequence[Provider] = tuple(PROVIDERS.values())
    dtypes: Sequence[str] = ("float32",)
    layouts: Sequence[str] = ("nchw", "nhwc")
    directions: Sequence[str] = ("forward", "backward", "both")
    fusions: Sequence[tuple[str | None, bool]] = ((None, False),)
    device: str = "cpu"
    graph: bool = True
    repetitions: int = timing.MIN_REPETITIONS
    # Seconds a group may be timed for on the CPU, where a call can take long.
    seconds_per_group: float = 20.0

    def groups(self) -> list[list[Case]]:
        """Cases by group; a shape without spatial axes has one layout."""
        product = itertools.product(
            self.shapes, self.dtypes, self.layouts, self.directions, self.fusions
        )
        groups = []
        for shape, dtype, layout, direction, (act, residual) in product:
            if layout != "nchw" and len(shape.dims) < 3:
                continue
            cases = [
                Case(op, tuple(shape.dims), dtype, layout, direction, act, residual)
                for op in self.ops
                if op.misfit(shape.dims) is None
            ]
            if cases:
                groups.append(cases)
        return groups


@dataclass
class Log:
    """The results file: whole and valid after every row, whenever the run is killed."""

    path: Path | None
    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: Sequence[Row]) -> None:
        self.rows.extend(rows)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        header = json.dumps(self.header, indent=2)
        unfinished.write_text(f'{{"header": {header},\n"rows": [\n{lines}\n]}}\n')
        unfinished.replace(self.path)


@dataclass
class _Entry:
    """A row in the making."""

    case: Case
    provider: Provider
    verdict: gate.Verdict | None = None
    candidate: timing.Candidate | None = None
    kernels: list[str] | None = None
    error: str | None = None


def usable(plan: Plan, say: Callable[[str], None] = lambda line: None) -> list[Provider]:
    """The plan's providers that can run here; the others are named once, in one line each."""
    found = []
    for provider in plan.providers:
        reason = provider.missing(plan.device)
        if reason is None:
            found.append(provider)
        else:
            say(f"{provider.name}: not measured, {reason}")
    return found


def _examine(
    entry: _Entry,
    ring: Sequence[operands.Operands],
    expected: dict[str, torch.Tensor],
    own: dict[str, float],
    plan: Plan,
) -> None:
    """Passes the entry through the gate and, if it may, makes its calls."""
    case, provider = entry.case, entry.provider

    def fresh() -> torch.nn.Module:
        return operands.prepare(provider.build(case), plan.device)

    try:
        with provider.switch():
            entry.verdict = gate.check(fresh(), case, ring[0], expected, own)
            entry.error = entry.verdict.refusal
            if entry.error is None:
                module = fresh()
                calls = [operands.call(module, each, case.direction) for each in ring]
                entry.candidate = timing.Candidate(calls, provider.switch)
                if plan.device == "cuda":
                    entry.kernels = timing.kernels(calls[0])
    except Exception as exception:  # a provider that raises is a row that says so
        entry.error = timing.describe(exception)


def _row(entry: _Entry, plan: Plan, cold: bool, copy: float) -> Row:
    case, candidate = entry.case, entry.candidate
    row: Row = dict.fromkeys(FIELDS)
    row |= {
        "op": case.op.name,
        "provider": entry.provider.name,
        "direction": case.direction,
        "shape": list(case.dims),
        "dtype": case.dtype,
        "layout": case.layout,
        "act": case.act,
        "residual": case.residual,
        "graph": plan.graph and plan.device == "cuda",
        "cold": cold,
        "min_bytes": min_bytes(case),
        "kernels": entry.kernels,
        "nodes": None if entry.kernels is None else len(entry.kernels),
    }
    if entry.verdict is not None:
        row |= {"max_err": entry.verdict.max_err, "ref_err": entry.verdict.ref_err}
    error = entry.error or (candidate.error if candidate else None)
    if candidate is not None and error is None:
        summary = timing.summarize(candidate.seconds)
        speed = row["min_bytes"] / summary.median / 1e6
        row |= {
            "ms_p10": summary.p10,
            "ms_median": summary.median,
            "ms_p90": summary.p90,
            "gb_per_s": speed,
            "pct_copy": 100 * speed / copy,
        }
    # Beyond the common fields only where there is no time, to say why.
    return row if error is None else row | {"error": error}


def measure(
    cases: Sequence[Case], providers: Sequence[Provider], plan: Plan, copy: float
) -> list[Row]:
    """The rows of one group."""
    case = cases[0]
    entries = [
        _Entry(each, provider)
        for each in cases
        for provider in providers
        if each.op.family in provider.families
    ]
    size, cold = 1, False
    stream: Any = nullcontext()
    if plan.device == "cuda":
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        size, cold = timing.ring_size(min_bytes(case), l2)
        stream = torch.cuda.stream(torch.cuda.Stream())
    torch.compiler.reset()
    with stream:
        ring = [operands.make(case, plan.device, seed) for seed in range(size)]
        own: dict[bool, dict[str, float]] = {}
        for each, members in itertools.groupby(entries, lambda entry: entry.case):
            same = list(members)
            try:
                if each.op.per_sample not in own:
                    own[each.op.per_sample] = gate.torch_error(each, ring[0])
                expected = gate.truth(each, ring[0])
            except Exception as exception:  # out of memory, or a dtype torch's norm does not take
                for entry in same:
                    entry.error = f"nothing to compare with: {timing.describe(exception)}"
                continue
            for entry in same:
                _examine(entry, ring, expected, own[each.op.per_sample], plan)
            del expected
        candidates = [e.candidate for e in entries if e.candidate is not None]
        if plan.device == "cuda":
            timing.time_cuda(candidates, plan.repetitions, plan.graph)
        else:
            timing.time_cpu(candidates, plan.repetitions, plan.seconds_per_group)
    return [_row(entry, plan, cold, copy) for entry in entries]


def run(
    plan: Plan,
    out: Path | None = None,
    budget: float = float("inf"),
    commit: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Log:
    """Measures group by group, each written to `out` at once; starts none once `budget` is spent.

    `say` hears a line for every group and for whatever is left out.
    """
    began = time.monotonic()
    groups, providers = plan.groups(), usable(plan, say)
    if not groups:
        raise ValueError("nothing to measure: no op of the selection fits a shape of it")
    copy = timing.copy_gb_per_s(plan.device)
    log = Log(out, machine.header(plan.device, copy, commit))
    log.add([])
    for done, cases in enumerate(groups, start=1):
        spent = time.monotonic() - began
        if spent > budget:
            left_out = f"{len(groups) - done + 1} of {len(groups)} groups left out"
            say(f"budget of {budget:g} s spent: {left_out}")
            break
        log.add(measure(cases, providers, plan, copy))
        spent = time.monotonic() - began
        left = min(spent / done * (len(groups) - done), max(0.0, budget - spent))
        case = cases[0]
        what = title(case.direction, case.dims, case.dtype, case.layout, case.act, case.residual)
        say(f"[{done}/{len(groups)}] {what}, {left:.0f} s left")
    return log

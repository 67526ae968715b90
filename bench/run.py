"""From cases to rows: check, time side by side, write down at once.

A group is all ops and providers on one shape, dtype, layout, direction and fusion; they share their
operands and are timed in turns, which is what makes their ratio worth reading.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from . import gate, machine, observe, operands, papers, plain, timing
from .operands import Operands
from .providers import PROVIDERS, Provider
from .registry import OPS, Case, Op, min_bytes, title
from .results import FIELDS, Job, Log, Row
from .shapes import Shape

__all__ = ["FIELDS", "DeviceLost", "Plan", "jobs", "measure", "run", "usable"]

Say = Callable[[str], None]


def _silent(line: str) -> None:
    pass


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
    # On a GPU: replayed from a graph, launched by the host; operands cold and warm in L2.
    graphs: Sequence[bool] = (True, False)
    colds: Sequence[bool] = (True, False)
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
                if op.misfit(shape.dims, residual) is None
            ]
            if cases:
                groups.append(cases)
        return groups

    def ways(self, case: Case) -> list[tuple[bool, bool]]:
        """(graph, cold) of the case's rows. The CPU has neither; small tensors are never cold."""
        if self.device != "cuda":
            return [(False, False)]
        can_be_cold = _ring(case)[1]
        colds = [cold for cold in self.colds if can_be_cold or not cold]
        return [*itertools.product(self.graphs, colds)]


@functools.cache
def _l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def _ring(case: Case) -> tuple[int, bool]:
    return timing.ring_size(min_bytes(case), _l2_bytes())


def usable(plan: Plan, say: Say = _silent) -> list[Provider]:
    """The plan's providers that can run here; the others are named once, in one line each."""
    found = []
    for provider in plan.providers:
        reason = provider.missing(plan.device)
        if reason is None:
            found.append(provider)
        else:
            say(f"{provider.name}: not measured, {reason}")
    return found


@dataclass
class _Entry:
    """One provider on one case, on its way to some rows."""

    case: Case
    provider: Provider
    rows: list[Row]
    refused: str | None = None
    verdict: gate.Verdict | None = None
    candidates: list[timing.Candidate] = field(default_factory=list)
    # By whether they were replayed from a graph.
    kernels: dict[bool, list[str] | None] = field(default_factory=dict)
    nodes: int | None = None
    peak_bytes: int | None = None
    error: str | None = None


def _identity(case: Case, provider: Provider, graph: bool, cold: bool) -> Row:
    return {
        "kind": "kernel",
        "op": case.op.name,
        "provider": provider.name,
        "direction": case.direction,
        "shape": list(case.dims),
        "dtype": case.dtype,
        "layout": case.layout,
        "act": case.act,
        "residual": case.residual,
        "graph": graph,
        "cold": cold,
    }


def jobs(plan: Plan, say: Say = _silent) -> list[Job]:
    """One job a group. What a provider refuses is a row the first time, and no row after that."""
    providers = usable(plan, say)
    told: set[tuple[Op, str, str]] = set()
    found = []
    for cases in plan.groups():
        entries = []
        for case, provider in itertools.product(cases, providers):
            if case.op.family not in provider.families:
                continue
            ways = plan.ways(case)
            reason = provider.refuses(case)
            if reason is not None:
                if (case.op, provider.name, reason) in told:
                    continue
                told.add((case.op, provider.name, reason))
                ways = ways[:1]
            elif not provider.captures(case):
                ways = [way for way in ways if not way[0]]
            rows = [_identity(case, provider, *way) for way in ways]
            if rows:
                entries.append(_Entry(case, provider, rows, reason))
        if entries:
            case = cases[0]
            name = title(
                case.direction, case.dims, case.dtype, case.layout, case.act, case.residual
            )
            rows = [row for entry in entries for row in entry.rows]
            found.append(Job(name, rows, functools.partial(_measure_wanted, plan, entries)))
    return found


def _measure_wanted(plan: Plan, entries: Sequence[_Entry], wanted: Sequence[Row]) -> list[Row]:
    kept = [
        dataclasses.replace(
            entry,
            rows=[row for row in entry.rows if row in wanted],
            candidates=[],
            kernels={},
        )
        for entry in entries
    ]
    return measure([entry for entry in kept if entry.rows], plan)


def _examine(
    entry: _Entry,
    ring: Sequence[Operands],
    history: Sequence[Operands],
    expected: dict[str, torch.Tensor],
    own: dict[str, float],
    plan: Plan,
) -> None:
    """Passes the entry through the gate and, if it may, makes its calls."""
    case, provider = entry.case, entry.provider

    def fresh() -> torch.nn.Module:
        module = operands.prepare(provider.build(case), plan.device)
        return operands.settle(module, history)

    try:
        with provider.switch():
            entry.verdict = gate.check(fresh(), case, ring[0], expected, own)
            entry.error = entry.verdict.refusal
            if entry.error is not None:
                return
            module = fresh()
            calls = [operands.call(module, each, case.direction) for each in ring]
            entry.peak_bytes = observe.peak_bytes(calls[0], plan.device)
            if plan.device == "cuda":
                entry.kernels[False] = observe.kernels(calls[0])
                if any(row["graph"] for row in entry.rows):
                    entry.nodes = observe.graph_nodes(calls[0])
                    again = observe.replay(calls[0])
                    entry.kernels[True] = observe.kernels(again) if again else None
        # As often as the ring is long, so that a sample is as long; on the CPU, once.
        warm = calls[:1] * min(max(len(calls), 4), timing.MAX_CALLS)
        for row in entry.rows:
            its_calls = calls if row["cold"] or plan.device != "cuda" else warm
            entry.candidates.append(
                timing.Candidate(its_calls, provider.switch, row["graph"], row["cold"])
            )
    except Exception as exception:  # a provider that raises is a row that says so
        entry.error = timing.describe(exception)


def _rows(entry: _Entry) -> Iterator[Row]:
    candidates: list[timing.Candidate | None] = [*entry.candidates]
    for identity, candidate in itertools.zip_longest(entry.rows, candidates):
        row: Row = dict.fromkeys(FIELDS) | identity
        row |= {
            "min_bytes": min_bytes(entry.case),
            "peak_bytes": entry.peak_bytes,
            "kernels": entry.kernels.get(identity["graph"]),
            "nodes": entry.nodes,
            "error": entry.refused or entry.error or (candidate.error if candidate else None),
        }
        if entry.verdict is not None:
            row |= {"max_err": entry.verdict.max_err, "ref_err": entry.verdict.ref_err}
        if candidate is not None and row["error"] is None:
            summary = timing.summarize(candidate.seconds)
            row |= {
                "ms_p10": summary.p10,
                "ms_median": summary.median,
                "ms_p90": summary.p90,
                "repetitions": len(candidate.seconds),
                "gb_per_s": row["min_bytes"] / summary.median / 1e6,
            }
        yield row


def measure(entries: Sequence[_Entry], plan: Plan) -> list[Row]:
    """The rows of one group's entries."""
    checked = [entry for entry in entries if entry.refused is None]
    on_gpu = plan.device == "cuda"
    stream: Any = torch.cuda.stream(torch.cuda.Stream()) if on_gpu and checked else nullcontext()
    if "torch._dynamo" in sys.modules:
        # What the last group compiled; a second of imports where nothing was.
        torch.compiler.reset()
    with stream:
        own: dict[Case, dict[str, float]] = {}
        rings: dict[str, list[Operands]] = {}
        for case, members in itertools.groupby(checked, lambda entry: entry.case):
            _prepare(case, [*members], own, rings, plan)
        candidates = [c for entry in checked for c in entry.candidates]
        if on_gpu:
            timing.time_cuda(candidates, plan.repetitions)
        else:
            timing.time_cpu(candidates, plan.repetitions, plan.seconds_per_group)
    return [row for entry in entries for row in _rows(entry)]


def _prepare(
    case: Case,
    entries: Sequence[_Entry],
    own: dict[Case, dict[str, float]],
    rings: dict[str, list[Operands]],
    plan: Plan,
) -> None:
    """Truth, gate and calls of the entries of one case; fills in what the next one shares."""
    try:
        # Most methods share their operands, which may be gigabytes.
        kind = case.op.family if case.op.family in papers.EXTRAS else ""
        if kind not in rings:
            size = _ring(case)[0] if plan.device == "cuda" else 1
            rings[kind] = [operands.make(case, plan.device, seed) for seed in range(size)]
        ring, steps = rings[kind], range(papers.WARM_UP.get(case.op.family, 0))
        history = [operands.make(case, plan.device, 1000 + step) for step in steps]
        expected = gate.truth(case, ring[0], history)
        fair = plain.standard(case)
        if fair not in own:
            same = expected if fair == case else gate.truth(fair, ring[0], history)
            own[fair] = gate.torch_error(fair, ring[0], same, history)
    except Exception as exception:  # out of memory, or a dtype torch's norm does not take
        for entry in entries:
            entry.error = f"nothing to compare with: {timing.describe(exception)}"
        return
    for entry in entries:
        _examine(entry, ring, history, expected, own[fair], plan)


def _finish(rows: Iterable[Row], copy: float) -> list[Row]:
    """Rows with what the sitting's copy bandwidth makes of them."""
    done = []
    for row in rows:
        speed = row.get("gb_per_s")
        done.append(row if speed is None else row | {"pct_copy": 100 * speed / copy})
    return done


class DeviceLost(RuntimeError):
    """A kernel broke the CUDA context; this process cannot measure any more, the next one can."""


def _measured(job: Job, wanted: Sequence[Row], on_gpu: bool) -> tuple[list[Row], str | None]:
    """A job's rows, and what the device says if it is lost.

    Whatever a job raises is the error of its rows. If a provider took the device with it, all that
    came after failed of that: those rows stay unwritten, for the next process to measure.
    """
    try:
        rows, raised = job.measure(wanted), False
    except Exception as exception:
        told = timing.describe(exception)
        rows, raised = [dict.fromkeys(FIELDS) | row | {"error": told} for row in wanted], True
    if not on_gpu:
        return rows, None
    try:
        torch.cuda.synchronize()
        return rows, None
    except RuntimeError as exception:
        lost = timing.describe(exception)
    if not raised:
        errors = ((row, row["error"] or "") for row in rows)
        first = next((r for r, e in errors if "CUDA error" in e or "Error [CUDA]" in e), None)
        if first is not None:
            same = (first["op"], first["provider"])
            rows = [r for r in rows if r["error"] is None or (r["op"], r["provider"]) == same]
    return rows, lost


def run(
    found: Sequence[Job],
    device: str,
    log: Log,
    budget: float = float("inf"),
    progress: Callable[[int, int, str, float], None] = lambda done, of, what, left: None,
    say: Say = _silent,
) -> Log:
    """Measures job by job what the log lacks, each written at once; starts none after `budget`.

    `progress(done, of, title, seconds left)` is called before each job and at the end, `say` told
    in a line what is left out.

    Raises:
        ValueError: if there is nothing to measure.
        DeviceLost: if a kernel took the device with it, once that is written down.
    """
    if not found:
        raise ValueError("nothing to measure: no op of the selection fits its shapes and runs here")
    began = time.monotonic()
    todo = [(job, wanted) for job in found if (wanted := log.missing(job.rows))]
    there = sum(len(job.rows) for job in found) - sum(len(wanted) for _, wanted in todo)
    if there:
        say(f"going on: {there} rows are there, {len(todo)} of {len(found)} groups left")
    if not todo:
        return log
    copy = timing.copy_gb_per_s(device)
    log.begin(machine.now(), copy)
    log.header.pop("left_out", None)
    left_out = 0
    for done, (job, wanted) in enumerate(todo):
        spent = time.monotonic() - began
        if spent > min(budget, job.latest):
            left_out += 1
            continue
        left = spent / done * (len(todo) - done) if done else float("nan")
        progress(done, len(todo), job.title, min(left, max(0.0, budget - spent)))
        rows, lost = _measured(job, wanted, device == "cuda")
        log.add(_finish(rows, copy))
        if lost is not None:
            raise DeviceLost(f"{lost} (in {job.title}); the same command goes on behind it")
    progress(len(todo), len(todo), "", 0.0)
    if left_out:
        log.header["left_out"] = left_out
        log.flush()
        say(f"{left_out} of {len(todo)} groups left out, to keep within {budget:g} s")
    return log

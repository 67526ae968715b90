"""How long a call takes, all candidates interleaved so that none has the quiet minute.

CUDA: each candidate is one CUDA graph of as many calls as it takes for their operands and results
to exceed 4 x L2, so every call finds its input in DRAM; events around a replay, over its calls.
CPU: wall clock around a call, warm, on a recorded number of threads.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], object]
# A graph of more calls than this takes longer to build than its row is worth; smaller tensors stay
# in L2 and their rows say cold: false.
MAX_RING = 512
MIN_REPETITIONS = 100


@dataclass
class Candidate:
    """One competitor: a call for each set of operands, and the switch they run under."""

    calls: Sequence[Call]
    switch: Callable[[], AbstractContextManager[Any]] = nullcontext
    seconds: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Summary:
    """Milliseconds a call."""

    p10: float
    median: float
    p90: float


def summarize(seconds: Sequence[float]) -> Summary:
    if len(seconds) == 1:
        return Summary(*(seconds[0] * 1e3,) * 3)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return Summary(deciles[0] * 1e3, statistics.median(seconds) * 1e3, deciles[8] * 1e3)


def ring_size(touched_bytes: int, l2_bytes: int) -> tuple[int, bool]:
    """Sets of operands to rotate through, and whether that keeps L2 cold."""
    wanted = max(1, math.ceil(4 * l2_bytes / max(touched_bytes, 1)))
    return min(wanted, MAX_RING), wanted <= MAX_RING


def describe(exception: Exception) -> str:
    first = str(exception).strip().splitlines()
    return f"{type(exception).__name__}: {first[0] if first else ''}"[:300]


@contextmanager
def _blamed(candidate: Candidate) -> Iterator[None]:
    """Runs under the candidate's switch; whatever a provider raises belongs to its row."""
    try:
        with candidate.switch():
            yield
    except Exception as exception:
        candidate.error = describe(exception)


def _interleave(
    candidates: Sequence[Candidate], sample: Callable[[int], None], rounds: Iterable[int]
) -> None:
    """Rounds of one sample each; the order turns so that no one always follows the same one."""
    for turn in rounds:
        for step in range(len(candidates)):
            index = (turn + step) % len(candidates)
            candidate = candidates[index]
            if candidate.error is None:
                with _blamed(candidate):
                    sample(index)


def _loop(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _ready(
    candidates: Sequence[Candidate], make: Callable[[Candidate], Call], warm_ups: int
) -> list[Call]:
    """Makes and warms up each candidate's run; one that raises keeps its error and no run."""
    runs = []
    for candidate in candidates:
        with _blamed(candidate):
            run = make(candidate)
            for _ in range(warm_ups):
                run()
            runs.append(run)
    return runs


def time_cpu(candidates: Sequence[Candidate], repetitions: int, seconds: float = math.inf) -> None:
    """Fills in `seconds` of each candidate; fewer repetitions, but five, if time would run out."""
    runs = _ready(candidates, lambda candidate: _loop(candidate.calls), warm_ups=1)
    running = [candidate for candidate in candidates if candidate.error is None]

    def sample(index: int) -> None:
        start = time.perf_counter()
        runs[index]()
        elapsed = time.perf_counter() - start
        running[index].seconds.append(elapsed / len(running[index].calls))

    began = time.perf_counter()
    _interleave(running, sample, range(1))
    affordable = seconds / (time.perf_counter() - began)
    _interleave(running, sample, range(1, int(min(repetitions, max(5, affordable)))))


def _capture(candidate: Candidate) -> Call:
    """The candidate's calls as one graph."""
    for _ in range(3):
        candidate.calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        # Results stay alive to the end, else the allocator would hand every call the same, warm
        # memory to write to.
        kept = [call() for call in candidate.calls]
    del kept
    replay: Call = graph.replay
    return replay


def time_cuda(candidates: Sequence[Candidate], repetitions: int, graph: bool) -> None:
    """Fills in `seconds` of each candidate. Needs a current stream other than the default one,
    and the one on which the calls were built: backward runs where its forward ran."""
    make = _capture if graph else lambda candidate: _loop(candidate.calls)
    runs = _ready(candidates, make, warm_ups=3)
    running = [candidate for candidate in candidates if candidate.error is None]
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in running]

    def sample(index: int) -> None:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        runs[index]()
        stop.record()
        events[index].append((start, stop))

    _interleave(running, sample, range(repetitions))
    torch.cuda.synchronize()
    for candidate, pairs in zip(running, events, strict=True):
        calls = len(candidate.calls)
        candidate.seconds = [a.elapsed_time(b) / 1e3 / calls for a, b in pairs]


def kernels(call: Call) -> list[str] | None:
    """Names of what one call puts on the device, copies and memsets included, in order."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
    except RuntimeError:  # profiling may be forbidden on a shared machine; its names are a bonus
        return None
    on_device = [
        event
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]
    on_device.sort(key=lambda event: event.time_range.start)
    return [event.name for event in on_device] or None


@functools.cache
def copy_gb_per_s(device: str) -> float:
    """Bytes read plus bytes written a second by `copy_`, in GB/s: the roof every row is held to."""
    numel = 2**28 if device == "cuda" else 2**26
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    copy = Candidate([lambda: target.copy_(source)])
    if device == "cuda":
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            time_cuda([copy], 20, graph=True)
    else:
        time_cpu([copy], 10)
    return 2 * source.nbytes / statistics.median(copy.seconds) / 1e9

"""How long a call takes, all candidates interleaved so that none has the quiet minute.

CUDA: events around the replay of one graph of many calls, or around calls launched one by one onto
an idle device, launch gaps and all. Cold: every call has its own operands and results, together
more than 4 x L2, so each finds its input in DRAM; what the candidate before left of them in L2 is
evicted first. Warm: all calls have the same.
CPU: wall clock around a call, warm, on the pinned threads that the header tells.
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
# in L2 and have warm rows only.
MAX_RING = 512
# Calls between two events where the host launches each: many beside the first one's latency, and
# 512 of them a sample would take minutes. Also the most that a warm graph repeats its call.
MAX_CALLS = 32
MIN_REPETITIONS = 100
# Caches fill and clocks settle in the first tens of calls.
WARM_UPS = 25
# About 0.1 ms for the device to be busy with, so that a graph is queued before its start event is
# reached; else a replay of 50 us would be charged the 10 us of its launch.
BACKLOG_CYCLES = 200_000


@dataclass
class Candidate:
    """One competitor: a call for each set of operands, and the switch they run under.

    ``cold``: results are kept while others are written, as the operands are, so their memory is as
    cold as that of the operands.
    """

    calls: Sequence[Call]
    switch: Callable[[], AbstractContextManager[Any]] = nullcontext
    graph: bool = False
    cold: bool = False
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


@dataclass(frozen=True)
class _Run:
    """What one sample does, and how many calls that is."""

    go: Call
    calls: int


def _in_turn(candidate: Candidate, at_once: int) -> _Run:
    """So many calls a sample, going on where the last sample stopped."""
    calls = candidate.calls
    kept: list[object] = [None] * len(calls)
    at_once = min(at_once, len(calls))
    position = 0

    def go() -> None:
        nonlocal position
        for _ in range(at_once):
            result = calls[position]()
            if candidate.cold:
                kept[position] = result
            position = (position + 1) % len(calls)

    return _Run(go, at_once)


def _ready(
    candidates: Sequence[Candidate], make: Callable[[Candidate], _Run], warm_ups: int
) -> list[_Run]:
    """Makes and warms up each candidate's run; one that raises keeps its error and no run."""
    runs = []
    for candidate in candidates:
        with _blamed(candidate):
            run = make(candidate)
            for _ in range(math.ceil(warm_ups / run.calls)):
                run.go()
            runs.append(run)
    return runs


def _rounds(
    running: Sequence[Candidate], sample: Callable[[int], None], repetitions: int, ends: float
) -> None:
    """So many rounds; no fewer than five, but none more once the clock shows `ends`."""
    turn = 0
    while running and turn < repetitions and (turn < 5 or time.perf_counter() < ends):
        _interleave(running, sample, [turn])
        turn += 1


def time_cpu(candidates: Sequence[Candidate], repetitions: int, seconds: float = math.inf) -> None:
    """Fills in `seconds` of each candidate; fewer repetitions, but five, if time would run out."""
    ends = time.perf_counter() + seconds
    runs = _ready(candidates, lambda candidate: _in_turn(candidate, 1), warm_ups=1)
    running = [candidate for candidate in candidates if candidate.error is None]

    def sample(index: int) -> None:
        start = time.perf_counter()
        runs[index].go()
        running[index].seconds.append((time.perf_counter() - start) / runs[index].calls)

    _rounds(running, sample, repetitions, ends)


def _capture(candidate: Candidate, pool: Any) -> _Run:
    """The candidate's calls as one graph. Graphs share a pool: none reads another's results."""
    for _ in range(3):
        candidate.calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        for call in candidate.calls:
            result = call()
            # Else the allocator hands every call the same, warm memory to write to.
            if candidate.cold:
                kept.append(result)
            del result
    del kept
    return _Run(graph.replay, len(candidate.calls))


def _evictor() -> Call:
    """Reads twice what L2 holds. Reads, since what is written there would have to go back to DRAM
    at the cost of whoever is timed next."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    other = torch.zeros(l2_bytes // 2, dtype=torch.float32, device="cuda")
    return lambda: other.sum()


def time_cuda(candidates: Sequence[Candidate], repetitions: int) -> None:
    """Fills in `seconds` of each candidate. Needs a current stream other than the default one,
    and the one on which the calls were built: backward runs where its forward ran."""
    pool = torch.cuda.graph_pool_handle()
    # Candidates share operands: 32 calls of one may leave all of them in L2 for the next one.
    evict = _evictor() if any(candidate.cold for candidate in candidates) else None

    def make(candidate: Candidate) -> _Run:
        nonlocal pool
        if not candidate.graph:
            return _in_turn(candidate, MAX_CALLS)
        try:
            return _capture(candidate, pool)
        except Exception:
            # Its pool counts as being recorded to for ever, and nobody else could be captured.
            pool = torch.cuda.graph_pool_handle()
            raise

    runs = _ready(candidates, make, WARM_UPS)
    running = [candidate for candidate in candidates if candidate.error is None]
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in running]

    def sample(index: int) -> None:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if evict is not None and running[index].cold:
            evict()
        if running[index].graph:
            torch.cuda._sleep(BACKLOG_CYCLES)
        else:
            # What is queued would hide the gaps between launches.
            torch.cuda.synchronize()
        start.record()
        runs[index].go()
        stop.record()
        events[index].append((start, stop))

    _interleave(running, sample, range(repetitions))
    torch.cuda.synchronize()
    for candidate, run, pairs in zip(running, runs, events, strict=True):
        candidate.seconds = [a.elapsed_time(b) / 1e3 / run.calls for a, b in pairs]


@functools.cache
def copy_gb_per_s(device: str) -> float:
    """Bytes read plus bytes written a second by `copy_`, in GB/s: the roof every row is held to."""
    numel = 2**28 if device == "cuda" else 2**26
    source = torch.rand(numel, device=device)
    target = torch.empty_like(source)
    copy = Candidate([lambda: target.copy_(source)], graph=True)
    if device == "cuda":
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            time_cuda([copy], MIN_REPETITIONS)
    else:
        time_cpu([copy], MIN_REPETITIONS, seconds=3.0)
    if copy.error is not None:
        raise RuntimeError(f"the copy that all rows are held to failed: {copy.error}")
    return 2 * source.nbytes / statistics.median(copy.seconds) / 1e9

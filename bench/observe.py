"""What a call does beside taking time: kernels by name, nodes of its graph, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import Call


@contextlib.contextmanager
def _profiled(*activities: ProfilerActivity, memory: bool = False) -> Iterator[Any]:
    """torch's profiler; the native library's own chatter stays off the terminal."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with profile(activities=activities, profile_memory=memory) as profiler:
            yield profiler
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def kernels(call: Call) -> list[str] | None:
    """Names of what one call puts on the device, copies and memsets included, in order."""
    call()
    torch.cuda.synchronize()
    try:
        with _profiled(ProfilerActivity.CPU, ProfilerActivity.CUDA) as profiler:
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


def graph_nodes(call: Call) -> int | None:
    """Nodes of the CUDA graph of one call; None where it cannot be captured or asked.

    The current stream must be one that can be captured.
    """
    call()
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph(keep_graph=True)
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
        count = ctypes.c_size_t()
        # Every driver has this function, and its CUgraph is the runtime's cudaGraph_t.
        ask = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes
        failed = ask(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    except (RuntimeError, OSError, AttributeError):
        return None
    return None if failed else count.value


def replay(call: Call) -> Call | None:
    """Replays one call from a CUDA graph; None where it cannot be captured.

    What a graph holds need not be what an eager call launches: a library may do without what it
    keeps for a stream.
    """
    call()
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
    except RuntimeError:
        return None
    again: Call = graph.replay
    return again


def peak_bytes(call: Call, device: str) -> int | None:
    """Most bytes that torch had allocated at once during a call, above what was there before it.

    The call's results count, what only the first call needs does not. On the CPU the profiler's
    record of allocations is added up.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with _profiled(ProfilerActivity.CPU, memory=True) as profiler:
        result = call()
    del result
    found = profiler.profiler
    if found is None or found.kineto_results is None:
        return None
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

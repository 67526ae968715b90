"""Zeros for the last arrivals to count in: one tensor a stream, cached.

A kernel leaves the counters it used at zero (``combine.last``), so they need no memset, and the
launches of one stream may share them because they follow each other. Two streams may not: their
kernels overlap, and both would count in the same place. Nor may CUDA graphs: a graph replays on
any stream, beside another that was captured with the same tensor. Under capture there are none,
and the caller combines in a launch of its own.
"""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor

# Enough for most plans at once; a plan that needs more gets a longer tensor.
LEAST = 1 << 14
# 4 MB a stream; a plan that wants more counters combines in a launch of its own.
MOST = 1 << 20

_cache: dict[tuple[torch.device, int], Tensor] = {}
# Too short by now, but kernels may still use them, on streams the allocator does not know of.
_retired: list[Tensor] = []


def zeros(x: Tensor, count: int) -> Tensor | None:
    """At least ``count`` zeroed int32 for kernels on x's current stream, or None."""
    stream = 0
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(x.device).cuda_stream
    if count > MOST:
        return None
    key = (x.device, stream)
    cached = _cache.get(key)
    if cached is None or cached.numel() < count:
        length = max(LEAST, 1 << (count - 1).bit_length()) if count else LEAST
        longer = _allocate(length, x.device)
        if longer is None:
            return None
        if cached is not None:
            _retired.append(cached)
        _cache[key] = cached = longer
    return cached


def _allocate(length: int, device: torch.device) -> Tensor | None:
    """Zeros that outlive the call, ready for the current stream; None where memory is out.

    By a thread of its own: the caller's may be allocating from the pool of a CUDA graph, as
    torch.compile does when it warms one up, and that memory is handed out again for the graph.
    """
    made: list[Tensor] = []

    def make() -> None:
        with contextlib.suppress(torch.OutOfMemoryError):
            made.append(torch.zeros(length, dtype=torch.int32, device=device))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if made and device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    return made[0] if made else None

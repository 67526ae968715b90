"""Zeros for the last arrivals to count in: one tensor a stream, cached.

A kernel leaves the counters it used at zero (``combine.last``), so they need no memset, and the
launches of one stream may share them because they follow each other. Two streams may not: their
kernels overlap, and both would count in the same place. Nor may CUDA graphs: a graph replays on
any stream, beside another that was captured with the same tensor. What is captured gets zeros of
the graph's own memory, which a node clears at every replay. That node costs what a launch that
combines would; but such a launch would be of kernels that no warm-up has compiled, and loading
code is not permitted during a capture.
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
# All there ever were: kernels may still use those that were too short for a later plan, on streams
# the allocator does not know of.
_kept: list[Tensor] = []


def zeros(x: Tensor, count: int) -> Tensor | None:
    """At least ``count`` zeroed int32 for kernels on x's current stream, or None."""
    if count > MOST:
        return None
    stream = 0
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            # Not one counter is none to clear, and no node.
            make = torch.zeros if count else torch.empty
            return make(max(count, 1), dtype=torch.int32, device=x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream
    key = (x.device, stream)
    cached = _cache.get(key)
    if cached is not None and cached.numel() >= count:
        return cached
    length = max(LEAST, 1 << (count - 1).bit_length()) if count else LEAST
    longer = _allocate(length, x.device)
    if longer is not None:
        _kept.append(longer)
        _cache[key] = longer
    return longer


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

"""Zeros for the last arrivals to count in: one tensor a stream, cached.

A kernel leaves the counters it used at zero (``combine.last``), so they need no memset, and the
launches of one stream may share them because they follow each other. Two streams may not: their
kernels overlap, and both would count in the same place. Nor may CUDA graphs: a graph replays on
any stream, beside another that was captured with the same tensor. Under capture there are none,
and the caller combines in a launch of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Enough for most plans at once; a plan that needs more gets a longer tensor.
LEAST = 1 << 14
# 4 MB a stream; a plan that wants more counters combines in a launch of its own.
MOST = 1 << 20

_cache: dict[tuple[torch.device, int], Tensor] = {}


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
        # The old tensor may be freed: kernels that still use it come first on this stream, and
        # the allocator hands its memory out in this stream's order.
        length = max(LEAST, 1 << (count - 1).bit_length()) if count else LEAST
        cached = torch.zeros(length, dtype=torch.int32, device=x.device)
        _cache[key] = cached
    return cached

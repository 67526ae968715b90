"""The two memory layouts the kernels know: dense NCHW and dense NHWC, of any rank.

Dense in both (one channel, or one position) counts as NCHW. Everything else is copied: to NHWC
where its channel is innermost, to NCHW otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_nhwc(x: Tensor) -> bool:
    if x.dim() < 3 or x.is_contiguous():
        return False
    return x.movedim(1, -1).is_contiguous()


def canonical(x: Tensor) -> Tensor:
    """x itself where it is dense, else a dense copy."""
    if x.is_contiguous() or is_nhwc(x):
        return x
    if x.dim() in _CHANNELS_LAST and x.stride(1) == 1:
        return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    return x.contiguous()


def like(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout of x (canonical, same shape): t itself where it has it."""
    if not is_nhwc(x):
        return t.contiguous()
    return t if is_nhwc(t) else torch.empty_like(x, dtype=t.dtype).copy_(t)

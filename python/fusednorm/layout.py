"""The two memory layouts the operators know: dense NCHW and dense NHWC, of any rank.

``canonical`` brings a tensor to the one its strides suggest; operators, their fakes and the
backward pass all call it, so that outputs get the same strides everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_nhwc(x: Tensor) -> bool:
    """Dense with the channel innermost, and not NCHW-dense as well (C = 1, S = 1 count as NCHW)."""
    if x.dim() < 3 or x.is_contiguous():
        return False
    if x.dim() in _CHANNELS_LAST:
        return x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    return x.movedim(1, -1).is_contiguous()


def canonical(x: Tensor) -> Tensor:
    """x itself if dense in either layout, else a dense copy in the layout it leans towards."""
    if x.is_contiguous() or is_nhwc(x):
        return x
    if x.dim() in _CHANNELS_LAST and x.stride(1) == 1:
        return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    return x.contiguous()


def like(t: Tensor, x: Tensor) -> Tensor:
    """t with the strides of x (canonical, same shape): t itself where it has them."""
    if is_nhwc(x):
        return t if is_nhwc(t) else torch.empty_like(x, dtype=t.dtype).copy_(t)
    return t.contiguous()

"""The mask relu leaves behind where a residual went into it: one bit an element, packed by vectors.

Backward needs of the residual only whether y was positive. Byte k belongs to the k-th 16 bytes of
y's memory, W = 16 / element size elements; its bit j is set if element k*W + j, counted in memory
order, is positive. (ceil(numel / W),) bytes of type uint8 stand for a whole activation tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusednorm.layout import is_nhwc

# An integer as wide as W booleans, which are a byte each.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask_vector(dtype: torch.dtype) -> int:
    """W, the elements a byte stands for."""
    return 16 // dtype.itemsize


def mask_size(x: Tensor) -> int:
    """Bytes of the mask of a tensor of x's size and dtype."""
    return -(-x.numel() // mask_vector(x.dtype))


def no_mask(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def pack(y: Tensor) -> Tensor:
    """The mask of y, which is dense NCHW or NHWC."""
    width = mask_vector(y.dtype)
    flat = y.movedim(1, -1).reshape(-1) if is_nhwc(y) else y.reshape(-1)
    bits = flat > 0
    if missing := -flat.numel() % width:
        bits = F.pad(bits, (0, missing))
    # A product of W booleans in a word with this number has them side by side in its top byte: the
    # j-th, at bit 8*j, is moved by 8*(W - 1) - 7*j, and no two of the other products meet.
    gather = sum(1 << (8 * (width - 1) - 7 * j) for j in range(width))
    word = bits.view(_WORDS[width]) * gather
    return word.view(torch.uint8).view(-1, width)[:, -1].contiguous()


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    """Booleans of the shape and layout of x, which is dense NCHW or NHWC."""
    width = mask_vector(x.dtype)
    # Every byte of a word gets the mask's, keeps of it the bit of its own number, and moves that,
    # by a carry into bit 7, to bit 0: all bytes at once, none of whose sums reaches the next.
    ones = sum(1 << 8 * j for j in range(width))
    own = sum(1 << 9 * j for j in range(width)) - (1 << 64 if width == 8 else 0)
    word = (mask.to(_WORDS[width]) * ones).bitwise_and_(own)
    word = word.add_(0x7F * ones).bitwise_right_shift_(7).bitwise_and_(ones)
    flat = word.view(torch.bool)[: x.numel()]
    if not is_nhwc(x):
        return flat.view(x.shape)
    return flat.view(x.movedim(1, -1).shape).movedim(-1, 1)


def keep(h: Tensor, kept: Tensor) -> Tensor:
    """h where kept, else 0, for an infinite h too. To and a float's bits with all or none takes a
    tenth of torch.where's time on the CPU."""
    word = torch.int64 if h.dtype == torch.float64 else torch.int32
    return h.view(word).bitwise_and(kept.view(torch.int8).neg().to(word)).view(h.dtype)

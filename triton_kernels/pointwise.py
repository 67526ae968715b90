"""What happens to one element: z, act(z), h = act'(z)*dy, in the accumulation type.

    z = (x - mean)*scale + b (+ residual),  scale = rstd*w: the difference first, because folding
    the mean into the shift loses the digits that a large mean takes

The kinks have torch's values: relu'(0) = 0, leaky_relu'(0) = slope; NaN passes. GELU is the exact
one, with erf. z is recomputed in the backward sweeps, by the same lines, and not stored.

``number`` puts a Python float together again: Triton passes it as float32, and passing float64
instead would bring double instructions into every float32 kernel, so the host sends the float32
nearest and what is left, which changes nothing in a float32 sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE: tl.constexpr = tl.constexpr(0)
RELU: tl.constexpr = tl.constexpr(1)
SILU: tl.constexpr = tl.constexpr(2)
GELU: tl.constexpr = tl.constexpr(3)
LEAKY_RELU: tl.constexpr = tl.constexpr(4)


@triton.jit
def number(high, low, ACC: tl.constexpr):
    return tl.full([], high, ACC) + tl.full([], low, ACC)


@triton.jit
def activate(z, slope, ACT: tl.constexpr):
    if ACT == RELU:
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACT == SILU:
        z = z / (1.0 + tl.exp(-z))
    elif ACT == GELU:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == LEAKY_RELU:
        z = tl.where(z > 0.0, z, z * slope)
    return z


@triton.jit
def activate_backward(dy, z, slope, ACT: tl.constexpr):
    if ACT == RELU:
        dy = tl.where(z <= 0.0, 0.0, dy)
    elif ACT == SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dy = dy * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    elif ACT == GELU:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        dy = dy * (cdf + z * density)
    elif ACT == LEAKY_RELU:
        dy = tl.where(z > 0.0, dy, dy * slope)
    return dy


@triton.jit
def load_normalized(
    x_ptr,
    residual_ptr,
    o_x,
    m_x,
    mean,
    scale,
    bias,
    ACC: tl.constexpr,
    NEEDED: tl.constexpr,
):
    """(x - mean, z) at o_x; z only where NEEDED: nothing else reads the residual."""
    centred = tl.load(x_ptr + o_x, m_x, 0.0).to(ACC) - mean
    z = centred
    if NEEDED:
        z = centred * scale + bias
        if residual_ptr is not None:
            z += tl.load(residual_ptr + o_x, m_x, 0.0).to(ACC)
    return centred, z


@triton.jit
def load_affine(pointer, offsets, m_c, like, DEFAULT: tl.constexpr):
    """The weight or bias of channels, DEFAULT where the pointer is None."""
    if pointer is None:
        return tl.full(like.shape, DEFAULT, like.dtype)
    else:
        return tl.load(pointer + offsets, m_c).to(like.dtype)

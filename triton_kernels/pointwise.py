"""What happens to one element: z, act(z), h = act'(z)*dy, in the accumulation type.

    z = (x - mean)*scale + b (+ residual),  scale = rstd*w: the difference first, because folding
    the mean into the shift loses the digits that a large mean takes

The kinks have torch's values: relu'(0) = 0, leaky_relu'(0) = slope; NaN passes. GELU is the exact
one, with erf. z is recomputed in the backward sweeps, by the same lines, and not stored; after
relu with a residual a mask may stand for it, one bit an element, so that the residual need not be
kept: bit j of byte e // W is y[e] > 0, e = the place in memory, j = e % W, W = 16 bytes of x.

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
def preactivation(centred, residual_ptr, at, o_x, m_x, scale, bias, POLICY: tl.constexpr):
    z = centred * scale + bias
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at + o_x, m_x, 0.0, eviction_policy=POLICY)
        z += residual.to(centred.dtype)
    return z


@triton.jit
def store_mask(mask_ptr, at, o_byte, m_byte, y, W: tl.constexpr):
    """The bits of a tile of y; the W columns of a byte lie in one thread."""
    positive = (y > 0.0).to(tl.int32).reshape(y.shape[0], y.shape[1] // W, W)
    weights = 1 << tl.arange(0, W)
    byte = tl.sum(positive * weights[None, None, :], 2)
    tl.store(mask_ptr + at + o_byte, byte.to(tl.uint8), m_byte)


@triton.jit
def load_mask(
    mask_ptr, at, o_x, m_x, byte_at, o_byte, m_byte, W: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """y > 0 of a tile. PACKED as it was stored; else, where tiles cut bytes, a load an element."""
    if PACKED:
        byte = tl.load(mask_ptr + byte_at + o_byte, m_byte, 0).to(tl.int32)
        bits = (byte[:, :, None] >> tl.arange(0, W)[None, None, :]) & 1
        return bits.reshape(o_x.shape) != 0
    else:
        place = at + o_x
        byte = tl.load(mask_ptr + place // W, m_x, 0).to(tl.int32)
        return ((byte >> (place % W).to(tl.int32)) & 1) != 0


@triton.jit
def load_affine(pointer, offsets, m_c, like, DEFAULT: tl.constexpr):
    """The weight or bias of channels, DEFAULT where the pointer is None."""
    if pointer is None:
        return tl.full(like.shape, DEFAULT, like.dtype)
    else:
        return tl.load(pointer + offsets, m_c).to(like.dtype)


@triton.jit
def upstream(
    dy,
    centred,
    residual_ptr,  # or None
    mask_ptr,  # or None; then z is not needed
    at,
    o_x,
    m_x,
    byte_at,
    o_byte,
    m_byte,
    scale,
    bias,
    slope,
    ACT: tl.constexpr,
    W: tl.constexpr,
    PACKED: tl.constexpr,
    POLICY: tl.constexpr,
):
    """h = act'(z)*dy; nothing but dy is read without an activation."""
    if mask_ptr is not None:
        h = tl.where(load_mask(mask_ptr, at, o_x, m_x, byte_at, o_byte, m_byte, W, PACKED), dy, 0.0)
    elif ACT == NONE:
        h = dy
    else:
        z = preactivation(centred, residual_ptr, at, o_x, m_x, scale, bias, POLICY)
        h = activate_backward(dy, z, slope, ACT)
    return h


@triton.jit
def store_output(
    y_ptr, residual_ptr, at, o_x, m_x, centred, scale, bias, slope, ACT: tl.constexpr
):  # fmt: skip
    """y of a tile, stored; the tile, as it was rounded, is what a mask is made of."""
    z = preactivation(centred, residual_ptr, at, o_x, m_x, scale, bias, "evict_first")
    y = activate(z, slope, ACT).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at + o_x, y, m_x, cache_modifier=".cs")
    return y


@triton.jit
def load_upstream(
    dy_ptr,
    x_ptr,
    mean,
    residual_ptr,  # or None
    mask_ptr,  # or None; then z is not needed
    at,
    o_x,
    m_x,
    byte_at,
    o_byte,
    m_byte,
    scale,
    bias,
    slope,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    W: tl.constexpr,
    PACKED: tl.constexpr,
    POLICY: tl.constexpr,
):
    """x - mean and h of a tile."""
    dy = tl.load(dy_ptr + at + o_x, m_x, 0.0, eviction_policy=POLICY).to(ACC)
    centred = tl.load(x_ptr + at + o_x, m_x, 0.0, eviction_policy=POLICY).to(ACC) - mean
    h = upstream(
        dy, centred, residual_ptr, mask_ptr, at, o_x, m_x, byte_at, o_byte, m_byte,
        scale, bias, slope, ACT, W, PACKED, POLICY,
    )  # fmt: skip
    return centred, h


@triton.jit
def store_gradients(
    dx_ptr,
    dresidual_ptr,  # or None
    at,
    o_x,
    m_x,
    centred,
    h,
    scale,
    shift,
    slant,
    LIVE: tl.constexpr,
):
    """dx = scale*h - (shift + (x - mean)*slant) of a tile, and h where a residual wants it."""
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at + o_x, h, m_x, cache_modifier=".cs")
    dx = scale * h
    if LIVE:
        dx -= shift + centred * slant
    tl.store(dx_ptr + at + o_x, dx, m_x, cache_modifier=".cs")


@triton.jit(do_not_specialize=["numel"])
def mask_kernel(y_ptr, mask_ptr, numel, W: tl.constexpr, BLOCK: tl.constexpr):
    """The mask from y as it lies in memory, for sweeps whose tiles cut bytes."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o_y = first + tl.arange(0, BLOCK // W)[:, None] * W + tl.arange(0, W)[None, :]
    y = tl.load(y_ptr + o_y, o_y < numel, 0.0)
    o_byte = first // W + tl.arange(0, BLOCK // W)
    byte = tl.sum((y > 0.0).to(tl.int32) * (1 << tl.arange(0, W))[None, :], 1)
    tl.store(mask_ptr + o_byte, byte.to(tl.uint8), o_byte * W < numel)

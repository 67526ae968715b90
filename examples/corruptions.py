"""Fifteen corruptions of images at five severities, deterministic, on NumPy and SciPy alone.

Kinds follow Hendrycks & Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions*,
arXiv 1903.12261: noise and contrast with the strengths ImageNet-C publishes, blurs and geometry in
fractions of the image's side, so that they mean the same at any resolution. Each image is drawn its
own random numbers from (seed, kind, severity, position): neither the batch it comes in nor the
order of calls matters.

    corrupted = corrupt(images, "gaussian_noise", severity=3, seed=0)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

Image = NDArray[np.float64]  # (C, H, W) in [0, 1]
Images = TypeVar("Images", NDArray[np.floating], torch.Tensor)
SEVERITIES = (1, 2, 3, 4, 5)


def gaussian_noise(x: Image, level: int, random: Generator) -> Image:
    return x + random.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[level], x.shape)


def shot_noise(x: Image, level: int, random: Generator) -> Image:
    photons = (60, 25, 12, 5, 3)[level]
    return random.poisson(x * photons) / photons


def impulse_noise(x: Image, level: int, random: Generator) -> Image:
    """Salt and pepper."""
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    drawn = random.random(x.shape)
    return np.where(drawn < amount, (drawn < amount / 2).astype(x.dtype), x)


def speckle_noise(x: Image, level: int, random: Generator) -> Image:
    return x + x * random.normal(0, (0.15, 0.2, 0.35, 0.45, 0.6)[level], x.shape)


def gaussian_blur(x: Image, level: int, random: Generator) -> Image:
    sigma = (0.015, 0.025, 0.035, 0.05, 0.07)[level] * _side(x)
    return ndimage.gaussian_filter(x, (0, sigma, sigma), mode="nearest")


def defocus_blur(x: Image, level: int, random: Generator) -> Image:
    """A disk, as an open aperture out of focus draws a point."""
    radius = (0.03, 0.045, 0.06, 0.08, 0.1)[level] * _side(x)
    reach = int(np.ceil(radius))
    across = np.arange(-reach, reach + 1)
    # A pixel on the rim counts for the part of it that is inside.
    disk = np.clip(radius + 0.5 - np.hypot(across[:, None], across), 0, 1)
    return _convolve(x, disk)


def motion_blur(x: Image, level: int, random: Generator) -> Image:
    """Along a line in a random direction."""
    length = (0.08, 0.12, 0.16, 0.21, 0.27)[level] * _side(x)
    angle = random.uniform(0, np.pi)
    reach = int(np.ceil(length / 2))
    steps = np.linspace(-length / 2, length / 2, 4 * reach + 1)
    line = np.zeros((2 * reach + 1,) * 2)
    places = np.stack([steps * np.sin(angle), steps * np.cos(angle)]) + reach
    low = np.floor(places).astype(int)
    part = places - low
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - part[0]) * np.abs(1 - dx - part[1])
            at = np.minimum(low + [[dy], [dx]], 2 * reach)
            np.add.at(line, (at[0], at[1]), weight)
    return _convolve(x, line)


def zoom_blur(x: Image, level: int, random: Generator) -> Image:
    farthest = (1.06, 1.11, 1.16, 1.21, 1.26)[level]
    zooms = np.linspace(1, farthest, 8)
    centre = (np.array(x.shape[1:]) - 1) / 2

    def zoomed(channel: NDArray[np.float64], zoom: float) -> NDArray[np.float64]:
        return ndimage.affine_transform(
            channel, np.eye(2) / zoom, centre - centre / zoom, order=1, mode="nearest"
        )

    return np.stack([np.mean([zoomed(channel, z) for z in zooms], 0) for channel in x])


def fog(x: Image, level: int, random: Generator) -> Image:
    """A smooth random haze over everything, the picture's range kept."""
    density = (0.2, 0.5, 0.75, 1.0, 1.5)[level]
    haze = np.zeros(x.shape[1:])
    for octave in (2, 4, 8):
        drawn = random.normal(size=x.shape[1:])
        smooth = ndimage.gaussian_filter(drawn, _side(x) / octave, mode="wrap")
        haze += smooth / (np.std(smooth) + 1e-12) / octave
    haze = (haze - haze.min()) / (np.ptp(haze) + 1e-12)
    brightest = x.max()
    return (x + density * haze) * brightest / (brightest + density)


def brightness(x: Image, level: int, random: Generator) -> Image:
    return x + (0.1, 0.2, 0.3, 0.4, 0.5)[level]


def darkness(x: Image, level: int, random: Generator) -> Image:
    """Underexposed: a power of the brightness."""
    return x ** (1.3, 1.7, 2.2, 3.0, 4.0)[level]


def contrast(x: Image, level: int, random: Generator) -> Image:
    """Towards each channel's mean."""
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def pixelate(x: Image, level: int, random: Generator) -> Image:
    """Down to a fraction of the pixels and up again, both as areas."""
    fraction = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    for axis in (1, 2):
        size = x.shape[axis]
        areas = _areas(size, max(1, round(size * fraction)))
        back = areas.T / areas.sum(0)[:, None]
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ areas.T @ back.T, -1, axis)
    return x


def elastic(x: Image, level: int, random: Generator) -> Image:
    """Every point goes a little way, its neighbours nearly the same way."""
    reach = (0.01, 0.02, 0.03, 0.04, 0.05)[level] * _side(x)
    moved = [
        ndimage.gaussian_filter(random.uniform(-1, 1, x.shape[1:]), _side(x) / 10, mode="reflect")
        for _ in range(2)
    ]
    at = np.indices(x.shape[1:]) + [m / (np.std(m) + 1e-12) * reach for m in moved]
    return np.stack(
        [ndimage.map_coordinates(channel, at, order=1, mode="reflect") for channel in x]
    )


def quantize(x: Image, level: int, random: Generator) -> Image:
    """Few levels of brightness, without dithering."""
    levels = (15, 7, 4, 3, 2)[level]
    return np.round(x * (levels - 1)) / (levels - 1)


FAMILIES: dict[str, tuple[Callable[[Image, int, Generator], Image], ...]] = {
    "noise": (gaussian_noise, shot_noise, impulse_noise, speckle_noise),
    "contrast": (contrast, fog, brightness, darkness),
    "blur": (gaussian_blur, defocus_blur, motion_blur, zoom_blur),
    "digital": (pixelate, elastic, quantize),
}
CORRUPTIONS = {kind.__name__: kind for kinds in FAMILIES.values() for kind in kinds}


def corrupt(images: Images, kind: str, severity: int, seed: int = 0, first: int = 0) -> Images:
    """Corrupted copies of images, of their type, dtype and device.

    Args:
        images: (N, C, H, W) with finite values in [0, 1], floating.
        kind: a name in ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: of all random numbers.
        first: position of the first image in its data set, where this is a part of it.

    Raises:
        ValueError, TypeError: an argument that is none of these.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind: expected one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: expected 1 to 5, got {severity!r}")
    if isinstance(images, torch.Tensor):
        array = corrupt(images.detach().cpu().double().numpy(), kind, severity, seed, first)
        if not images.is_floating_point():
            raise TypeError(f"images: expected a floating dtype, got {images.dtype}")
        return cast(Images, torch.from_numpy(array).to(images))
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"images: expected a floating dtype, got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {images.shape}")
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images: expected values in [0, 1], got {images.min()} to {images.max()}")
    number = zlib.crc32(kind.encode())
    out = np.empty(images.shape, np.float64)
    for i, image in enumerate(images):
        random = np.random.default_rng((seed, number, severity, first + i))
        out[i] = CORRUPTIONS[kind](image.astype(np.float64), severity - 1, random)
    return np.clip(out, 0, 1).astype(images.dtype)


def _side(x: Image) -> int:
    return min(x.shape[1:])


def _convolve(x: Image, kernel: NDArray[np.float64]) -> Image:
    return ndimage.convolve(x, (kernel / kernel.sum())[None], mode="nearest")


def _areas(size: int, fewer: int) -> NDArray[np.float64]:
    """(fewer, size): the share of each pixel in each larger one, rows adding up to 1."""
    edges = np.arange(fewer + 1) * size / fewer
    pixels = np.arange(size)
    low, high = edges[:-1, None], edges[1:, None]
    overlap = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    return cast("NDArray[np.float64]", overlap / overlap.sum(1, keepdims=True))

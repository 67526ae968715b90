"""The corruption kit: deterministic, in range, worse with severity, and each what its name says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, corrupt

DIGITS = torch.as_tensor(load_digits().images[:8] / 16).unsqueeze(1)
IMAGES = torch.nn.functional.interpolate(DIGITS, size=32, mode="bilinear").numpy()


def distance(kind, severity, images):
    return float(np.sqrt(np.mean((corrupt(images, kind, severity) - images) ** 2)))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_severity_orders_the_damage(kind):
    # Smooth and without a raster of its own, which coarser pixels might happen to meet.
    drawn = ndimage.gaussian_filter(np.random.default_rng(0).random((8, 1, 31, 31)), (0, 0, 1, 1))
    images = (drawn - drawn.min()) / np.ptp(drawn)
    levels = [distance(kind, severity, images) for severity in SEVERITIES]
    assert levels[0] > 0.005 and levels == sorted(levels) and levels[4] > 1.5 * levels[0], levels


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_same_numbers_for_the_same_image(kind):
    """Whatever comes with it, whatever was drawn before, as an array or as a tensor."""
    whole = corrupt(IMAGES, kind, 3, seed=7)
    np.random.seed(0), torch.manual_seed(5)
    assert np.array_equal(corrupt(IMAGES[5:9], kind, 3, seed=7, first=5), whole[5:9])
    tensor = corrupt(torch.from_numpy(IMAGES), kind, 3, seed=7)
    assert np.array_equal(tensor.numpy(), whole)
    single = corrupt(torch.from_numpy(IMAGES).float(), kind, 3, seed=7)
    assert single.dtype == torch.float32
    # Rounding may push a Poisson count or a level of brightness over.
    assert (np.abs(single.numpy() - whole) < 1e-5).mean() > 0.95
    assert whole.min() >= 0 and whole.max() <= 1 and np.isfinite(whole).all()


RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur", "fog",
          "elastic"}  # fmt: skip


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_seeds_and_positions_differ_where_chance_plays(kind):
    same = np.repeat(IMAGES[:1], 2, 0)
    two = corrupt(same, kind, 3)
    assert np.array_equal(two[0], two[1]) == (kind not in RANDOM)
    assert np.array_equal(corrupt(same, kind, 3, seed=1), two) == (kind not in RANDOM)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (1, 1, 8, 8), (2, 1, 5, 7), (0, 3, 8, 8)])
def test_any_shape(kind, shape):
    images = np.random.default_rng(0).random(shape).astype(np.float32)
    for severity in SEVERITIES:
        assert corrupt(images, kind, severity).shape == shape


def test_noise_has_the_published_strength():
    grey = np.full((1, 1, 400, 400), 0.5)
    for severity, sigma in zip((1, 2, 3), (0.08, 0.12, 0.18), strict=True):
        noise = corrupt(grey, "gaussian_noise", severity) - 0.5
        assert noise.std() == pytest.approx(sigma, rel=0.02) and abs(noise.mean()) < 2e-3
    for severity, photons in zip((1, 2, 3), (60, 25, 12), strict=True):
        noise = corrupt(grey, "shot_noise", severity) - 0.5
        assert noise.var() == pytest.approx(0.5 / photons, rel=0.1)
    for severity, amount in zip(SEVERITIES, (0.03, 0.06, 0.09, 0.17, 0.27), strict=True):
        hit = corrupt(grey, "impulse_noise", severity)
        assert (hit == 0).mean() == pytest.approx(amount / 2, rel=0.1)
        assert (hit == 1).mean() == pytest.approx(amount / 2, rel=0.1)
    assert corrupt(grey, "speckle_noise", 2).std() == pytest.approx(0.1, rel=0.02)


def test_contrast_and_brightness_are_affine():
    x = np.random.default_rng(0).random((3, 2, 9, 9)) * 0.4 + 0.1
    mean = x.mean((2, 3), keepdims=True)
    np.testing.assert_allclose(corrupt(x, "contrast", 4), mean + 0.1 * (x - mean))
    np.testing.assert_allclose(corrupt(x, "brightness", 3), x + 0.3)


@pytest.mark.parametrize("kind", [f.__name__ for f in FAMILIES["blur"]] + ["pixelate"])
def test_blurs_keep_flat_pictures_and_smooth_the_rest(kind):
    flat = np.full((1, 2, 20, 20), 0.3)
    np.testing.assert_allclose(corrupt(flat, kind, 5), flat)
    rough = np.random.default_rng(0).random((1, 1, 40, 40))
    assert corrupt(rough, kind, 5).std() < 0.6 * rough.std()


@pytest.mark.parametrize("kind", ["gaussian_blur", "defocus_blur", "motion_blur"])
def test_blurs_scale_with_the_picture(kind):
    """A point's image is as wide, in fractions of the side, at twice the resolution."""

    def width(size):
        x = np.zeros((1, 1, size, size))
        x[0, 0, size // 2, size // 2] = 1
        y = corrupt(x, kind, 5)[0, 0]
        rows, columns = np.indices(y.shape)
        variance = ((rows - size // 2) ** 2 + (columns - size // 2) ** 2) * y
        return np.sqrt(variance.sum() / y.sum()) / size

    assert width(128) == pytest.approx(width(64), rel=0.1)


def test_pixelation_averages_areas():
    x = np.random.default_rng(0).random((1, 1, 8, 8))
    blocks = x.reshape(4, 2, 4, 2).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(corrupt(x, "pixelate", 2)[0, 0], blocks)


@pytest.mark.parametrize(
    "images, kind, severity, error, message",
    [
        (IMAGES, "rain", 1, ValueError, "kind: expected one of gaussian_noise, .*got 'rain'"),
        (IMAGES, "fog", 0, ValueError, "severity: expected 1 to 5, got 0"),
        (IMAGES * 255, "fog", 1, ValueError, r"values in \[0, 1\], got 0.0 to 255.0"),
        (IMAGES * np.nan, "fog", 1, ValueError, r"values in \[0, 1\], got nan"),
        (IMAGES[0], "fog", 1, ValueError, r"\(N, C, H, W\), got \(1, 32, 32\)"),
        ((IMAGES * 255).astype(np.uint8), "fog", 1, TypeError, "floating dtype, got uint8"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "fog", 1, TypeError, "got torch.uint8"),
    ],
)
def test_bad_input(images, kind, severity, error, message):
    with pytest.raises(error, match=message):
        corrupt(images, kind, severity)

"""Paired fidelity: known decibels, clipping, SSIM against its window-by-window definition."""

import math

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate import paired


def _images(seed, shape=(3, 14, 13, 2)):
    return np.random.default_rng(seed).uniform(-1.0, 1.0, shape).astype(np.float32)


def _slow_ssim(a, b):
    """Wang et al. 2004, equations 13-16, of two [H,W] planes in [0, 1], window by window."""
    offsets = range(-5, 6)
    weights = [[math.exp(-(i * i + j * j) / 4.5) for j in offsets] for i in offsets]
    weights = np.array(weights) / np.sum(weights)
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            u, v = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mu, mv = np.sum(weights * u), np.sum(weights * v)
            var_u, var_v = np.sum(weights * (u - mu) ** 2), np.sum(weights * (v - mv) ** 2)
            cov = np.sum(weights * (u - mu) * (v - mv))
            values.append(
                (2 * mu * mv + 1e-4)
                * (2 * cov + 9e-4)
                / ((mu**2 + mv**2 + 1e-4) * (var_u + var_v + 9e-4))
            )
    return np.mean(values)


def test_a_constant_offset_has_known_mse_and_decibels():
    """Offset 0.02 on a range of 2: 20 log10(100) = 40 dB."""
    x = np.full((4, 5, 5, 1), 0.25, np.float64)
    np.testing.assert_allclose(paired.x0_errors(x + 0.02, x), 4e-4, rtol=1e-9)
    np.testing.assert_allclose(paired.psnrs(x + 0.02, x), 40.0, rtol=1e-9)


def test_each_image_is_measured_by_itself():
    x = _images(0)
    y = x.copy()
    y[1] *= 0.5
    errors = paired.x0_errors(y, x)
    assert errors[0] == errors[2] == 0.0
    assert errors[1] == pytest.approx(np.mean((0.5 * x[1].astype(np.float64)) ** 2))
    assert list(np.isinf(paired.psnrs(y, x))) == [True, False, True]


def test_psnr_clips_and_mse_does_not():
    x = np.full((1, 4, 4, 1), 1.0)
    assert paired.x0_errors(x + 0.5, x)[0] == pytest.approx(0.25)
    assert np.isinf(paired.psnrs(x + 0.5, x)[0])


def test_ssim_equals_the_window_by_window_definition():
    x = _images(1)
    y = np.clip(x + 0.3 * _images(2), -1, 1)
    expected = [
        np.mean([_slow_ssim((x[i, ..., c] + 1) / 2, (y[i, ..., c] + 1) / 2) for c in range(2)])
        for i in range(3)
    ]
    np.testing.assert_allclose(paired.ssims(x, y, chunk=2), expected, rtol=1e-5)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    x = _images(3)
    np.testing.assert_allclose(paired.ssims(x, x), 1.0)
    little, much = (paired.ssims(x + s * _images(4), x).mean() for s in (0.1, 0.5))
    assert much < little < 1.0
    assert paired.ssims(-x, x).mean() < 0.0


def test_paired_difference_sees_what_unpaired_scatter_hides():
    rng = np.random.default_rng(5)
    difficulty = rng.exponential(1.0, 100)
    better = difficulty * 0.97
    difference = paired.paired_difference(better, difficulty)
    assert not difference.contains(0.0)
    assert difference.value == pytest.approx(-0.03 * difficulty.mean())
    shuffled = paired.paired_difference(better, rng.permutation(difficulty))
    assert shuffled.contains(0.0)


def test_unusable_input():
    x = _images(6)
    with pytest.raises(InputError, match="seeds that both arms have"):
        paired.x0_errors(x[:2], x)
    y = x.copy()
    y[1, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="float_x_0: 1 of 3 images"):
        paired.psnrs(x, y)
    with pytest.raises(InputError, match="11 pixels"):
        paired.ssims(x[:, :10], x[:, :10])
    with pytest.raises(InputError, match="one per shared seed"):
        paired.paired_difference(np.zeros(3), np.zeros(4))

"""Paired fidelity: how far an arm's image is from the float model's of the same seed and label.

These lead the report: pairing removes the variance between images, so a few hundred of them
resolve what FID cannot, and naive 4-bit models can *improve* FID while every image changes.
x_0 is the sampler's float output before the uint8 boundary. MSE is taken on it as it is; PSNR
and SSIM on it clipped to [-1, 1], with data range 2. PSNR is averaged over images in dB (not
computed from the mean MSE), since intervals are over images.
"""

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate.intervals import Interval, mean_interval

SSIM_WINDOW = 11


def x0_errors(x_0, float_x_0) -> np.ndarray:
    """Mean squared error of each image, [n] float64, between `x_0` and `float_x_0` [n,H,W,C].

    Raises InputError on different shapes, another rank, or values that are not finite.
    """
    a, b = _pair(x_0, float_x_0)
    return np.mean((a - b) ** 2, axis=(1, 2, 3))


def psnrs(x_0, float_x_0) -> np.ndarray:
    """10 log10(2^2 / MSE) of each image clipped to [-1, 1], [n] dB; infinite where equal."""
    a, b = _pair(x_0, float_x_0)
    error = np.mean((np.clip(a, -1.0, 1.0) - np.clip(b, -1.0, 1.0)) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(4.0 / error)


def ssims(x_0, float_x_0, *, chunk: int = 256) -> np.ndarray:
    """Structural similarity of each image, [n], mean over channels (Wang et al. 2004).

    Gaussian window of 11 pixels and sigma 1.5 where it fits wholly inside the image, K1 = 0.01,
    K2 = 0.03, on intensities (clip(x) + 1) / 2 with range 1, since luminance must not be negative.
    Raises InputError like `x0_errors`, and on images smaller than the window.
    """
    a, b = _pair(x_0, float_x_0)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise InputError(f"got images {a.shape[1:3]}, SSIM needs {SSIM_WINDOW} pixels a side")
    return np.concatenate(
        [_ssims(a[i : i + chunk], b[i : i + chunk]) for i in range(0, len(a), chunk)]
    )


def paired_difference(a, b) -> Interval:
    """Mean of a_i - b_i with its t interval, for per-image values [n] of two arms by seed.

    The paired test: the arms are tied at 5 % when the interval contains 0.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise InputError(f"got {a.shape} and {b.shape} values, expected one per shared seed each")
    return mean_interval(a - b)


def _ssims(a, b) -> np.ndarray:
    """SSIM of each pair in [n,H,W,C]; local moments are two small matrix products per plane."""
    down, across = _window_matrix(a.shape[1]), _window_matrix(a.shape[2]).T
    a, b = (np.moveaxis((np.clip(x, -1.0, 1.0) + 1.0) / 2.0, -1, 1) for x in (a, b))
    mean_a, mean_b = down @ a @ across, down @ b @ across
    var_a = down @ (a * a) @ across - mean_a**2
    var_b = down @ (b * b) @ across - mean_b**2
    cov = down @ (a * b) @ across - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return np.mean(luminance * structure, axis=(1, 2, 3))


def _window_matrix(size: int) -> np.ndarray:
    """[size-10, size]: row i holds the normalised Gaussian window that starts at pixel i."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    matrix = np.zeros((size - SSIM_WINDOW + 1, size))
    for i in range(len(matrix)):
        matrix[i, i : i + SSIM_WINDOW] = window / window.sum()
    return matrix


def _pair(x_0, float_x_0) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x_0, np.float64), np.asarray(float_x_0, np.float64)
    if a.shape != b.shape or a.ndim != 4:
        raise InputError(
            f"got x_0 {a.shape} and {b.shape} for the float arm, expected equal shapes [n,H,W,C]: "
            "pass the images of the seeds that both arms have"
        )
    for name, x in (("x_0", a), ("float_x_0", b)):
        bad = int(np.count_nonzero(~np.isfinite(x).all(axis=(1, 2, 3))))
        if bad:
            raise InputError(f"{name}: {bad} of {len(x)} images have NaN or infinite pixels")
    return a, b

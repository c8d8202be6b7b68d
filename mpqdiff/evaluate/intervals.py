"""Confidence intervals: Student's t for means over images, the jackknife for set metrics.

A set metric (FID, above all) gets no plain bootstrap. A bootstrap sample of n images holds only
about 0.632 n distinct ones, so its fitted covariance is that of a smaller, more concentrated
sample and FID's bias, which falls like 1/n, is added a second time: at a few hundred images the
whole percentile interval lies above the very estimate it is for (a test shows it). Subsamples
*without* replacement are honest smaller samples. Their spread around their own mean, rescaled
from n - d images to n (Shao and Wu 1989, delete-d jackknife), gives a standard error, and the
interval is centred on the estimate of the full sample:

    se^2 = (n - d) / d * mean_b (theta_b - mean(theta))^2

Leaving out a fifth keeps the subsamples near n, where the metric behaves as at n; where it is near
its floor it is quadratic in the sample and this se comes out up to 2 times too large. Where a
subsample costs seconds (FID in 2048 dimensions), the first-order influence of every image takes
its place (Efron 1982, the infinitesimal jackknife): se^2 = sum_i influence_i^2 / (n (n - 1)).
Intervals hold for the fixed reference set: they answer "would other seeds of this model change
the number", not "would another reference set".
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError

NORMAL_95 = 1.959963984540054


class Interval(NamedTuple):
    """A point estimate with the ends of its two-sided 95 % interval; low <= value <= high."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> list[float]:
        """[low, high], as results.json holds it."""
        return [self.low, self.high]

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2.0

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


def normal_interval(value: float, standard_error: float) -> Interval:
    """`value` +- 1.96 standard errors."""
    half = NORMAL_95 * float(standard_error)
    return Interval(float(value), float(value) - half, float(value) + half)


@lru_cache(maxsize=64)
def t_quantile(dof: int, level: float = 0.95) -> float:
    """Two-sided quantile q of Student's t: P(|t| < q) = level, for `dof` >= 1.

    With t = sqrt(dof) tan(a) the density becomes cos(a)^(dof-1), smooth on [0, pi/2], and is
    integrated on a grid; relative error below 1e-5.
    """
    if dof < 1 or not 0.0 < level < 1.0:
        raise InputError(f"got dof={dof}, level={level}; expected dof >= 1 and level in (0, 1)")
    # Past 12 standard deviations of the normal limit there is no mass to integrate.
    angle = np.linspace(0.0, min(np.pi / 2, 12.0 / np.sqrt(dof)), 20001)
    density = np.cos(angle) ** (dof - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(dof) * np.tan(np.interp(level, mass / mass[-1], angle)))


def mean_interval(values) -> Interval:
    """Mean of `values` [n], n >= 2, with its t interval (independent images)."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise InputError(f"got values of shape {values.shape}, expected [n], n >= 2, all finite")
    mean = float(values.mean())
    half = t_quantile(values.size - 1) * float(values.std(ddof=1)) / np.sqrt(values.size)
    return Interval(mean, float(mean - half), float(mean + half))


def omissions(n: int, *, seed: int, draws: int = 200, fraction: float = 0.2) -> np.ndarray:
    """`draws` random sets of rows to leave out of n, each `fraction` of them: int [draws, d].

    The same (n, seed) gives the same sets, so two arms can be compared on common subsamples.
    Raises InputError when fewer than 2 rows would stay.
    """
    d = max(1, round(n * fraction))
    if n - d < 2 or draws < 2 or not 0.0 < fraction < 1.0:
        raise InputError(
            f"got n={n}, draws={draws}, fraction={fraction}; expected n >= 3, draws >= 2 and a "
            "fraction in (0, 1) that leaves 2 rows"
        )
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(n)[:d] for _ in range(draws)])


def kept_rows(omitted, n: int) -> np.ndarray:
    """Which of n rows stay in each subsample: bool [B,n], from `omitted` [B,d]."""
    kept = np.ones((len(omitted), n), bool)
    np.put_along_axis(kept, np.asarray(omitted), False, axis=1)
    return kept


def jackknife_interval(point: float, values, *, n: int, d: int) -> Interval:
    """Interval around `point`, the statistic of all n images, from `values` [B] of it without d.

    Raises InputError on values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise InputError("the statistic is not finite on a subsample: more images are needed")
    return normal_interval(point, float(np.sqrt((n - d) / d * np.var(values))))


def influence_interval(point: float, influence) -> Interval:
    """Interval around `point` from the first-order `influence` [n] of every image on it, n >= 2.

    Influences (or pseudo-values) of two arms on the same seeds subtract image by image, to the
    influence of the difference. Raises InputError on values that are not finite.
    """
    half = mean_interval(influence).half_width
    return Interval(float(point), float(point) - half, float(point) + half)


def proportion_interval(count: int, n: int) -> Interval:
    """Share count / n with the score interval of Wilson (1927), which has a width at 0 and at 1."""
    if not 0 <= count <= n or n < 1:
        raise InputError(f"got {count} of {n}, expected a count from 0 to n and n >= 1")
    share, z2 = count / n, NORMAL_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Rounding may put an end a hair inside the share at 0 and 1.
    low, high = min(centre - half, share), max(centre + half, share)
    return Interval(share, float(max(low, 0.0)), float(min(high, 1.0)))

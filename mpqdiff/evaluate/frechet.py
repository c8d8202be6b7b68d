"""Frechet distance between two Gaussians fitted to features (Heusel et al. 2017, eq. 6).

FID = |mu_1 - mu_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^(1/2))

With F F^T = C_2 the last trace is the sum of the square roots of the eigenvalues of F^T C_1 F, a
symmetric matrix: no general matrix root is needed, and F is a Cholesky factor, prepared once. All
is float64. The value depends on the feature space and, through its bias, on the number of images:
compare only at equal n in one space. `fid_infinity` extrapolates the bias away.
"""

import math
from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate import intervals, statistics
from mpqdiff.evaluate.statistics import CHUNK, check_gaussian, finite_features

# Features of more dimensions get their interval from influences: 200 eigenvalue problems of 128
# dimensions take half a second on one core, of 2048 dimensions half an hour.
SUBSAMPLED_DIMENSIONS = 128
# Eigenvalues that should be 0 come out below this share of the largest (measured: 0.1 eps).
_NOISE = 8 * np.finfo(np.float64).eps


class Target(NamedTuple):
    """One side of the distance, prepared once: `factor` [D,rank], factor @ factor.T = cov."""

    mean: np.ndarray  # [D]
    cov: np.ndarray  # [D,D]
    factor: np.ndarray

    @property
    def rank(self) -> int:
        """Of the covariance: D where it is regular."""
        return self.factor.shape[1]


class Linearised(NamedTuple):
    """A distance with the first-order effect of every image on it.

    Attributes:
      value: the distance.
      influence: [n], of mean 0: `value` moves by influence_i / n when image i gains 1 / n weight.
      rank: of the product of both covariances; below the target's where images are too few.
    """

    value: float
    influence: np.ndarray
    rank: int


def moments(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D,D] of `features` [n,D], float64.

    Raises InputError when n < 2, when the rank is not 2, or on values that are not finite.
    """
    found = statistics.moments(features)
    return found.mean, found.cov


def target(mean, cov) -> Target:
    """Prepare a Gaussian with `mean` [D] and `cov` [D,D] for many distances to it.

    Raises InputError on shapes that do not fit, NaN, or an asymmetric covariance.
    """
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    check_gaussian(mean, cov, "mean and covariance")
    cov = (cov + cov.T) / 2
    return Target(mean, cov, _factor(cov))


def distance_to(target: Target, mean, cov):
    """Squared Frechet distances [...] of Gaussians `mean` [...,D], `cov` [...,D,D] to `target`."""
    roots = _roots(np.linalg.eigvalsh(_product(target, cov)))
    return _distance(target, mean, np.trace(cov, axis1=-2, axis2=-1), roots.sum(axis=-1))


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """The distance of N(mu1 [D], cov1 [D,D]) and N(mu2, cov2); rank-deficient ones included.

    Raises InputError on shapes that do not fit, NaN, or an asymmetric covariance.
    """
    first = target(mu1, cov1)
    mean, cov = np.asarray(mu2, np.float64), np.asarray(cov2, np.float64)
    check_gaussian(mean, cov, "mean and covariance")
    if first.mean.shape != mean.shape:
        raise InputError(
            f"got {first.mean.size} and {mean.size} feature dimensions, expected equal "
            "ones: both sides must come from the same feature space"
        )
    return float(distance_to(first, mean, (cov + cov.T) / 2))


def fid(features, reference: Target) -> float:
    """Distance of the Gaussian fitted to `features` [n,D] to the prepared `reference`."""
    return float(distance_to(reference, *moments(features)))


def linearised(features, reference: Target) -> Linearised:
    """FID of `features` [n,D] with each image's influence, from one eigendecomposition.

    With z = x - mu, K = F^T C F and the gradient dFID/dC = G = I - F K^(-1/2) F^T,
    influence_i = 2 (mu - mu_ref) . z_i + z_i^T G z_i n / (n - 1) - tr(G C). A direction that no
    image has stays without influence: no reweighting of the images reaches it.
    """
    x = finite_features(features, "features")
    mean, cov = moments(x)
    values, vectors = np.linalg.eigh(_product(reference, cov))
    roots = _roots(values)
    kept = roots > 0
    whitened = reference.factor @ (vectors[:, kept] / np.sqrt(roots[kept]))
    shift = 2.0 * (mean - reference.mean)
    effects = []
    for start in range(0, len(x), CHUNK):
        z = x[start : start + CHUNK].astype(np.float64) - mean
        spread = np.sum(z * z, axis=1) - np.sum((z @ whitened) ** 2, axis=1)
        effects.append(z @ shift + spread * len(x) / (len(x) - 1))
    effect = np.concatenate(effects)
    value = _distance(reference, mean, np.trace(cov), roots.sum())
    return Linearised(float(value), effect - effect.mean(), int(np.count_nonzero(kept)))


def terms(features, reference: Target, omitted) -> tuple[Linearised, np.ndarray | None]:
    """(the distance, what its interval is made of): FIDs of the subsamples [B], or influences [n].

    Terms of two arms subtract to those of their difference; None without `omitted` [B,d].
    """
    whole = linearised(features, reference)
    if omitted is None or features.shape[1] > SUBSAMPLED_DIMENSIONS:
        return whole, None if omitted is None else whole.influence
    return whole, delete_d_fids(features, reference, omitted)


def ends(value: float, terms, features, omitted) -> list[float] | None:
    """The 95 % interval around `value`, of `features` [n,D], from its `terms`; None without."""
    if terms is None:
        return None
    n, dimensions = features.shape
    if dimensions > SUBSAMPLED_DIMENSIONS:
        return intervals.influence_interval(value, terms).ends
    return intervals.jackknife_interval(value, terms, n=n, d=omitted.shape[1]).ends


def fid_infinity(features, reference: Target, *, parts: int = 4, seed: int = 0) -> Linearised:
    """FID extrapolated to infinitely many images, for FID_N = FID + b / N (Chong & Forsyth 2020).

    The images, shuffled by `seed`, are cut into j = 1 ... `parts` disjoint parts; the mean FID of
    the parts of each cut is fitted by a straight line in j / n, and its value at 0 is returned.
    Using every image once per cut, this scatters less than random subsets do. `influence` is that
    of the fitted value. Costs parts (parts + 1) / 2 eigendecompositions.

    Raises InputError where a part has fewer than 2 D images: the line does not hold there.
    """
    x = finite_features(features, "features")
    n, dimensions = x.shape
    if parts < 2 or n // parts < 2 * dimensions:
        raise InputError(
            f"got {n} images in {dimensions} dimensions for parts={parts}, expected at least 2 "
            f"parts and {2 * dimensions * max(parts, 2)} images for the extrapolation of FID"
        )
    order = np.random.default_rng(seed).permutation(n)
    cuts = np.arange(1, parts + 1, dtype=np.float64)
    # Row 0 of the pseudo-inverse gives the intercept of the least-squares line.
    weights = np.linalg.pinv(np.stack([np.ones(parts), cuts], axis=1))[0]
    value, influence, rank = 0.0, np.zeros(n), dimensions
    for count, weight in zip(range(1, parts + 1), weights, strict=True):
        for rows in np.array_split(order, count):
            part = linearised(x[rows], reference)
            value += weight * part.value / count
            influence[rows] += weight * part.influence
            rank = min(rank, part.rank)
    return Linearised(float(value), influence, rank)


def delete_d_fids(features, reference: Target, omitted) -> np.ndarray:
    """FIDs [B] of `features` [n,D] without the rows `omitted` [B,d], all at n - d images.

    Sums over the few omitted rows are subtracted from the full sums, in coordinates centred on
    the full mean, where that subtraction loses nothing.
    """
    x = np.asarray(features, np.float64)
    mean = x.mean(axis=0)
    centred = x - mean
    full = centred.T @ centred
    kept = len(x) - omitted.shape[1]
    block = max(1, math.floor(2**24 / max(full.size, 1)))  # covariances held at a time: 128 MiB
    distances = []
    for start in range(0, len(omitted), block):
        shifts, covs = [], []
        for rows in omitted[start : start + block]:
            out = centred[rows]
            shift = -out.sum(axis=0) / kept
            shifts.append(shift)
            covs.append((full - out.T @ out - kept * np.outer(shift, shift)) / (kept - 1))
        distances.append(distance_to(reference, mean + np.stack(shifts), np.stack(covs)))
    return np.concatenate(distances)


def _product(target: Target, cov) -> np.ndarray:
    """F^T cov F, [...,rank,rank], exactly symmetric."""
    product = target.factor.T @ cov @ target.factor
    return (product + np.swapaxes(product, -1, -2)) / 2


def _distance(target: Target, mean, trace, root_sum):
    shift = np.sum((mean - target.mean) ** 2, axis=-1)
    # Rounding can leave -1e-14 at equal Gaussians; the distance itself is never negative.
    return np.maximum(shift + trace + np.trace(target.cov) - 2.0 * root_sum, 0.0)


def _factor(cov) -> np.ndarray:
    """F [D,rank] with F F^T = cov: Cholesky's, by eigenvectors where that meets a zero pivot."""
    floor = _NOISE * len(cov) * np.max(np.diag(cov), initial=0.0)
    try:
        lower = np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:
        lower = None
    if lower is not None and np.min(np.diag(lower) ** 2, initial=np.inf) > floor:
        return lower
    values, vectors = np.linalg.eigh(cov)
    roots = _roots(values)
    return vectors[:, roots > 0] * roots[roots > 0]


def _roots(eigenvalues):
    """Square roots [...,D] of the eigenvalues of a positive semi-definite matrix.

    An eigenvalue that should be 0 comes out near eps times the largest, and its root near 1e-8:
    what is within that noise counts as 0.
    """
    largest = np.max(eigenvalues, axis=-1, keepdims=True, initial=0.0)
    return np.sqrt(np.where(eigenvalues > _NOISE * largest, eigenvalues, 0.0))

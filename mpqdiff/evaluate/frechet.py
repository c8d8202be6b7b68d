"""Frechet distance between two Gaussians fitted to features (Heusel et al. 2017, eq. 6).

FID = |mu_1 - mu_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1^(1/2) C_2 C_1^(1/2))^(1/2))

The trace of the matrix root is a sum of square roots of eigenvalues of a symmetric matrix, so
no general matrix root is needed; everything is float64. The value depends on the feature space
and, through its bias, on the number of images: compare only at equal n in one space.
"""

from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError


class Target(NamedTuple):
    """One side of the distance, prepared once: `mean` [D], `cov` [D,D], `root` = cov^(1/2)."""

    mean: np.ndarray
    cov: np.ndarray
    root: np.ndarray


def moments(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D,D] of `features` [n,D], float64.

    Raises InputError when n < 2, when the rank is not 2, or on values that are not finite.
    """
    x = finite_features(features, "features")
    if len(x) < 2:
        raise InputError(f"got {len(x)} feature rows, expected at least 2 for a covariance")
    mean = x.mean(axis=0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def target(mean, cov) -> Target:
    """Prepare a Gaussian with `mean` [D] and `cov` [D,D] for many distances to it.

    Raises InputError on shapes that do not fit, NaN, or an asymmetric covariance.
    """
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise InputError(f"got mean {mean.shape} and cov {cov.shape}, expected [D] and [D,D]")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise InputError("mean or covariance has NaN or infinite entries: check the features")
    if not np.allclose(cov, cov.T, rtol=1e-5, atol=1e-6 * np.abs(cov).max(initial=0.0)):
        raise InputError("the covariance is not symmetric: pass the output of moments()")
    cov = (cov + cov.T) / 2
    values, vectors = np.linalg.eigh(cov)
    return Target(mean, cov, (vectors * _roots(values)) @ vectors.T)


def distance_to(target: Target, mean, cov):
    """Squared Frechet distances [...] of Gaussians `mean` [...,D], `cov` [...,D,D] to `target`."""
    product = target.root @ cov @ target.root
    eigenvalues = np.linalg.eigvalsh((product + np.swapaxes(product, -1, -2)) / 2)
    traces = np.trace(cov, axis1=-2, axis2=-1) + np.trace(target.cov)
    shift = np.sum((mean - target.mean) ** 2, axis=-1)
    # Rounding can leave -1e-14 at equal Gaussians; the distance itself is never negative.
    return np.maximum(shift + traces - 2.0 * _roots(eigenvalues).sum(axis=-1), 0.0)


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """The distance of N(mu1 [D], cov1 [D,D]) and N(mu2, cov2); rank-deficient ones included.

    Raises InputError on shapes that do not fit, NaN, or an asymmetric covariance.
    """
    first, second = target(mu1, cov1), target(mu2, cov2)
    if first.mean.shape != second.mean.shape:
        raise InputError(
            f"got {first.mean.size} and {second.mean.size} feature dimensions, expected equal "
            "ones: both sides must come from the same feature space"
        )
    return float(distance_to(first, second.mean, second.cov))


def fid(features, reference: Target) -> float:
    """Distance of the Gaussian fitted to `features` [n,D] to the prepared `reference`."""
    return float(distance_to(reference, *moments(features)))


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
    shifts, covs = [], []
    for rows in omitted:
        out = centred[rows]
        shift = -out.sum(axis=0) / kept
        shifts.append(shift)
        covs.append((full - out.T @ out - kept * np.outer(shift, shift)) / (kept - 1))
    return distance_to(reference, mean + np.stack(shifts), np.stack(covs))


def finite_features(features, name: str) -> np.ndarray:
    """`features` as float64 [n,D]. Raises InputError on another rank or rows with NaN."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2:
        raise InputError(f"got {name} of shape {x.shape}, expected [n,D]")
    bad = int(np.count_nonzero(~np.isfinite(x).all(axis=1)))
    if bad:
        raise InputError(
            f"{name}: {bad} of {len(x)} rows have NaN or infinite values, expected finite ones: "
            "look at the images that gave them"
        )
    return x


def _roots(eigenvalues):
    """Square roots [...,D] of the eigenvalues of a positive semi-definite matrix.

    An eigenvalue that should be 0 comes out near eps times the largest, and its root near 1e-8:
    what is below the numerical rank counts as 0.
    """
    floor = np.finfo(np.float64).eps * eigenvalues.shape[-1]
    largest = np.max(eigenvalues, axis=-1, keepdims=True, initial=0.0)
    return np.sqrt(np.where(eigenvalues > floor * largest, eigenvalues, 0.0))

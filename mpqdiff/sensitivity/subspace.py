"""Principal directions of a site's activations, from a covariance [D,D] or from few rows [N,D].

The covariance C = E (y - mean)(y - mean)^T has eigenvalues v_1 >= ... >= v_D >= 0. The subspace of
the first

    k = min {k : sum_{i<=k} v_i >= share sum_i v_i}

eigenvectors holds `share` of the variance (k95 at 0.95, the intrinsic dimension), and k / D says
which part of the features the activations really use. With fewer rows than features the N x N
Gram of the centred rows has the same eigenvalues, and C is never formed. NumPy float64 throughout.
"""

from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError

# A feature whose variance is below this share of its squared mean is constant but for rounding.
CONSTANT = 1e-12
# Rounding of a sum of variances; of an eigenvalue, and of asymmetry, by the largest entry.
ROUNDING = 1e-9
ASYMMETRY = 1e-6
# Rounding of a float32 covariance of thousands of features, by its largest eigenvalue.
NEGATIVE = 1e-4


class Principal(NamedTuple):
    """Eigenvalues and eigenvectors of a covariance; r = D, or fewer where rows were fewer."""

    mean: np.ndarray  # float64 [D]
    values: np.ndarray  # float64 [r], descending, >= 0
    vectors: np.ndarray  # float64 [D,r], orthonormal columns in the order of `values`


def check_moments(mean, cov, name: str = "activations") -> tuple[np.ndarray, np.ndarray]:
    """`mean` [D] and `cov` [D,D] in float64.

    Raises InputError on other shapes, entries that are not finite and a `cov` that is not
    symmetric.
    """
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or not mean.size or cov.shape != (mean.size, mean.size):
        raise InputError(
            f"{name}: mean of shape {mean.shape} and covariance of shape {cov.shape}, expected [D] "
            "and [D,D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise InputError(f"{name}: NaN or infinity in the moments: check the weights and the rows")
    gap = np.abs(cov - cov.T).max()
    if gap > ASYMMETRY * np.abs(cov).max():
        raise InputError(
            f"{name}: the covariance differs from its transpose by {gap:.3g}, expected a symmetric "
            "one: pass E (y - mean)(y - mean)^T"
        )
    return mean, cov


def _descending(matrix, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, rounding below 0 removed, and eigenvectors of a symmetric matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    if values[0] < -NEGATIVE * np.abs(values).max():
        raise InputError(
            f"{name}: eigenvalue {values[0]:.3g} beside the largest of {values[-1]:.3g}, expected "
            "none below 0: this is no covariance"
        )
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def _check_varies(mean, variance, name: str) -> None:
    """Raises InputError where every feature is constant but for rounding; both [D]."""
    if np.all(variance <= CONSTANT * mean**2):
        raise InputError(
            f"{name}: all {mean.size} features are constant (largest variance "
            f"{variance.max():.3g}), expected some that vary: leave the site out, or record it "
            "over several timesteps and labels"
        )


def principal(mean, cov, *, name: str = "activations") -> Principal:
    """Principal directions of features of `mean` [D] and covariance `cov` [D,D].

    Where eigenvalues are equal their directions are arbitrary in the space that they share.
    Raises InputError like `check_moments`, and on eigenvalues below 0 and features that are all
    constant.
    """
    mean, cov = check_moments(mean, cov, name)
    values, vectors = _descending(cov, name)
    _check_varies(mean, np.diagonal(cov), name)
    return Principal(mean, values, vectors)


def principal_of_rows(rows, *, name: str = "activations") -> Principal:
    """`principal` of `rows` [N,D], divided by N; with N < D by the Gram of the centred rows.

    With U the eigenvectors of the Gram X X^T / N and v its eigenvalues, the directions are
    X^T U / sqrt(N v); those of no variance are left out, so r <= min(N - 1, D). Raises InputError
    on fewer than 2 rows, another rank, entries that are not finite and constant features.
    """
    x = np.asarray(rows, np.float64)
    if x.ndim != 2 or len(x) < 2 or not x.shape[1]:
        raise InputError(f"{name}: rows of shape {x.shape}, expected [N,D] with N >= 2")
    if not np.isfinite(x).all():
        raise InputError(f"{name}: NaN or infinity in the rows: check the weights and the inputs")
    mean = x.mean(axis=0)
    x = x - mean
    count, features = x.shape
    if count >= features:
        return principal(mean, x.T @ x / count, name=name)
    _check_varies(mean, np.mean(x**2, axis=0), name)
    values, left = _descending(x @ x.T / count, name)
    kept = values > ROUNDING * values[0]
    values = values[kept]
    return Principal(mean, values, x.T @ left[:, kept] / np.sqrt(count * values))


def pooled(means, covs) -> tuple[np.ndarray, np.ndarray]:
    """(mean [D], cov [D,D]) over all timesteps, of means [T,D] and covs [T,D,D] of equal counts.

    The law of total covariance: the mean of the covariances and the covariance of the means.
    Raises InputError where the shapes do not fit.
    """
    means, covs = np.asarray(means, np.float64), np.asarray(covs, np.float64)
    if means.ndim != 2 or not means.size or covs.shape != (*means.shape, means.shape[1]):
        raise InputError(
            f"means of {means.shape} and covariances of {covs.shape}: expected [T,D] and [T,D,D]"
        )
    apart = means - means.mean(axis=0)
    return means.mean(axis=0), covs.mean(axis=0) + apart.T @ apart / len(means)


def intrinsic_dimension(values, *, share: float = 0.95) -> int:
    """k: the least number of eigenvalues `values` [r], descending, that hold `share` of their sum.

    A sum that is short of the share by rounding reaches it. Raises InputError on a share outside
    (0,1] and values that are negative, not finite or all 0.
    """
    if not 0 < share <= 1:
        raise InputError(f"share={share}: expected a share of the variance in (0,1]")
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or np.any(values < 0) or not values.any():
        raise InputError(f"eigenvalues {values}: expected [r], at least 0, one or more above")
    held = np.cumsum(values)
    return int(np.argmax(held >= share * held[-1] * (1 - ROUNDING))) + 1


def basis(own: Principal, *, share: float = 0.95) -> np.ndarray:
    """V [D,k]: the principal directions that hold `share` of the variance."""
    return own.vectors[:, : intrinsic_dimension(own.values, share=share)]

"""Kernel distance (KID): squared MMD with k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018).

MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

The estimator is unbiased at every n, so unlike FID it may be slightly negative and may be
compared across different n. Kernels are float64, in square tiles; only row sums are kept.
"""

from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate.statistics import finite_features


class KernelDistance(NamedTuple):
    """An MMD^2 with its standard error and `values` [n], each image's jackknife pseudo-value.

    The mean of these is `value`. Both are None where there are too few images for them.
    """

    value: float
    standard_error: float | None
    values: np.ndarray | None = None


def kernel_distance(features, reference, *, chunk: int = 1024) -> KernelDistance:
    """Unbiased MMD^2 of all `features` [n,D] and all `reference` [m,D], n and m at least 2.

    The standard error is the delete-one jackknife's over the n images, exactly, from the row
    sums of one kernel matrix; the reference set is taken as given.
    Raises InputError on too few rows, different D, or values that are not finite.
    """
    x, y = _two_sets(features, reference)
    n, m = len(x), len(y)
    within_x, within_y = _within_sums(x, chunk), _within_sums(y, chunk)
    across = _row_sums(x, y, chunk)
    reference_term = within_y.sum() / (m * (m - 1))
    total_x, total_across = within_x.sum(), across.sum()
    value = total_x / (n * (n - 1)) + reference_term - 2.0 * total_across / (n * m)
    if n < 3:
        return KernelDistance(float(value), None)
    # Without row i the sums lose row and column i of K_xx, and row i of K_xy.
    left_out = (total_x - 2.0 * within_x) / ((n - 1) * (n - 2)) - 2.0 * (total_across - across) / (
        (n - 1) * m
    )
    variance = (n - 1) / n * np.sum((left_out - left_out.mean()) ** 2)
    pseudo = n * value - (n - 1) * (left_out + reference_term)
    return KernelDistance(float(value), float(np.sqrt(variance)), pseudo)


def subset_kernel_distance(
    features, reference, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 2020
) -> tuple[float, float]:
    """KID as usually published: (mean, standard deviation) of MMD^2 over random subset pairs.

    The subsets are drawn as torch-fidelity draws them, so its seed (2020) gives its numbers.

    The subsets overlap, so the deviation says how a single subset scatters and is no standard
    error of the mean; `kernel_distance` has that. Raises InputError as it does, and when
    `subset_size` exceeds either set.
    """
    x, y = _two_sets(features, reference)
    if not 2 <= subset_size <= min(len(x), len(y)) or num_subsets < 1:
        raise InputError(
            f"got subset_size={subset_size}, num_subsets={num_subsets} for sets of {len(x)} and "
            f"{len(y)}; expected a size from 2 to {min(len(x), len(y))} and at least one subset"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        own = rng.choice(len(x), subset_size, replace=False)
        real = rng.choice(len(y), subset_size, replace=False)
        values.append(kernel_distance(x[own], y[real]).value)
    return float(np.mean(values)), float(np.std(values))


def _two_sets(features, reference) -> tuple[np.ndarray, np.ndarray]:
    x = finite_features(features, "features")
    y = finite_features(reference, "reference features")
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise InputError(
            f"got sets of shape {x.shape} and {y.shape}, expected equal D and at least 2 rows each"
        )
    return x, y


def _kernel_sums(x, y) -> tuple[np.ndarray, np.ndarray]:
    """Sums of k(x_i, y_j) over j, [n], and over i, [m], for float64 rows; y may be x itself."""
    base = x @ y.T  # where y is x, numpy takes the symmetric product, half the work
    base *= 1.0 / x.shape[1]
    base += 1.0
    square = base * base  # numpy's float power takes far longer
    return np.einsum("ij,ij->i", square, base), np.einsum("ij,ij->j", square, base)


def _row_sums(x, y, chunk: int) -> np.ndarray:
    """sum_j k(x_i, y_j), [n]; only two tiles of rows are held in float64."""
    sums = np.zeros(len(x))
    for i in range(0, len(x), chunk):
        rows = x[i : i + chunk].astype(np.float64)
        for j in range(0, len(y), chunk):
            sums[i : i + chunk] += _kernel_sums(rows, y[j : j + chunk].astype(np.float64))[0]
    return sums


def _within_sums(x, chunk: int) -> np.ndarray:
    """sum_{j != i} k(x_i, x_j), [n]; each tile off the diagonal serves its mirror image too."""
    sums = np.zeros(len(x))
    for i in range(0, len(x), chunk):
        rows = x[i : i + chunk].astype(np.float64)
        sums[i : i + chunk] += _kernel_sums(rows, rows)[0]
        sums[i : i + chunk] -= (np.sum(rows * rows, axis=1) / x.shape[1] + 1.0) ** 3
        for j in range(i + chunk, len(x), chunk):
            across, back = _kernel_sums(rows, x[j : j + chunk].astype(np.float64))
            sums[i : i + chunk] += across
            sums[j : j + chunk] += back
    return sums

"""Streaming mean and covariance of features, in float64, for sets larger than memory.

Batches are folded in with the pairwise update of Chan, Golub and LeVeque (1983, eq. 1.5):

    mean = mean_a + delta n_b / n,   M2 = M2_a + M2_b + delta delta^T n_a n_b / n,

where delta = mean_b - mean_a and M2 is the sum of outer products about the mean. The same update
merges the moments of two hosts, so a set split in any way gives the same covariance, to rounding.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpqdiff.errors import InputError

CHUNK = 2048  # rows that are held in float64 at a time


class Moments(NamedTuple):
    """Sums of `count` rows of features: `mean` [D] and `m2` [D,D], both float64."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance [D,D]. Raises InputError below 2 rows."""
        if self.count < 2:
            raise InputError(f"got {self.count} feature rows, expected at least 2 for a covariance")
        return self.m2 / (self.count - 1)

    def update(self, batch) -> "Moments":
        """These moments with the rows of `batch` [b,D], any float type; an empty one is ignored.

        Raises InputError on another rank or D, or rows that are not finite.
        """
        moments = self
        rows = finite_features(batch, "features")
        for start in range(0, len(rows), CHUNK):
            x = rows[start : start + CHUNK].astype(np.float64)
            mean = x.mean(axis=0)
            x -= mean
            moments = moments.merge(Moments(len(x), mean, x.T @ x))
        return moments

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows. Raises InputError where D differs."""
        if self.mean.shape != other.mean.shape:
            raise InputError(
                f"got moments of {self.mean.size} and {other.mean.size} dimensions, expected equal "
                "ones: both sides must come from the same feature space"
            )
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        m2 = np.outer(delta, delta * (self.count / count * other.count))
        m2 += self.m2
        m2 += other.m2
        return Moments(count, self.mean + delta * (other.count / count), m2)


def empty(dimensions: int) -> Moments:
    """Moments of no rows, to start from."""
    return Moments(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))


def moments(features) -> Moments:
    """Moments of `features` [n,D]. Raises InputError like `Moments.update`, and below 2 rows."""
    rows = finite_features(features, "features")
    if len(rows) < 2:
        raise InputError(f"got {len(rows)} feature rows, expected at least 2 for a covariance")
    return empty(rows.shape[1]).update(rows)


def allreduce(own: Moments) -> Moments:
    """The moments of all processes' rows, the same on every process. One process: `own`.

    Merged in the order of the processes, so every one gets the same bits. Every process must call
    it, one without rows with `empty(D)`.
    """
    if jax.process_count() == 1:
        return own
    size = own.mean.size
    packed = np.concatenate([[float(own.count)], own.mean, own.m2.ravel()])
    # As pairs of 32-bit words: a float64 would be rounded to float32 on its way.
    gathered = np.asarray(multihost_utils.process_allgather(packed.view(np.uint32)))
    total = empty(size)
    for row in np.ascontiguousarray(gathered).view(np.float64):
        mean, m2 = row[1 : 1 + size], row[1 + size :].reshape(size, size)
        total = total.merge(Moments(int(row[0]), mean, m2))
    return total


def finite_features(features, name: str) -> np.ndarray:
    """`features` [n,D], float32 or float64 as they are, other types as float64.

    Raises InputError on another rank or rows with NaN.
    """
    x = np.asarray(features)
    if x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float64)
    if x.ndim != 2:
        raise InputError(f"got {name} of shape {x.shape}, expected [n,D]")
    bad = sum(
        int(np.count_nonzero(~np.isfinite(x[start : start + CHUNK]).all(axis=1)))
        for start in range(0, len(x), CHUNK)
    )
    if bad:
        raise InputError(
            f"{name}: {bad} of {len(x)} rows have NaN or infinite values, expected finite ones: "
            "look at the images that gave them"
        )
    return x

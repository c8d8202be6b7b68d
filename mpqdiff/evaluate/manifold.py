"""Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1): the k-NN manifold estimate.

A set's manifold is the union of the balls around its points that reach to their k-th nearest
neighbour. Precision: share of generated points inside the real manifold (fidelity). Recall:
share of real points inside the generated manifold (coverage). Both depend on the set sizes;
compare at equal sizes. Distances are float64, in chunks of rows.
"""

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate import intervals
from mpqdiff.evaluate.statistics import finite_features

# Neighbours kept per point for the jackknife. With a fifth of the points left out, fewer than 3 of
# a point's 50 nearest stay with a probability below 1e-30.
_LISTED = 50


def precision_recall(features, reference, *, k: int = 3, chunk: int = 512) -> tuple[float, float]:
    """(precision, recall) of generated `features` [n,D] against real `reference` [m,D].

    Raises InputError unless k >= 1, both sets have more than k rows, equal D and finite values.
    """
    generated, real = _two_sets(features, reference, k)
    own, theirs = _squared_radii(generated, k, chunk), _squared_radii(real, k, chunk)
    found, covered = 0, np.zeros(len(real), bool)
    for i in range(0, len(generated), chunk):
        squared = _squared_distances(generated[i : i + chunk], real)
        found += np.count_nonzero((squared <= theirs).any(axis=1))
        covered |= (squared <= own[i : i + chunk, None]).any(axis=0)
    return found / len(generated), float(covered.mean())


def inside(features, manifold, *, k: int = 3, chunk: int = 512) -> np.ndarray:
    """Which of `features` [n,D] lie inside the manifold of the rows of `manifold` [m,D]: bool [n].

    Raises InputError like `precision_recall`.
    """
    points, centres = _two_sets(features, manifold, k)
    radii = _squared_radii(centres, k, chunk)
    return np.concatenate(
        [
            (_squared_distances(points[i : i + chunk], centres) <= radii).any(axis=1)
            for i in range(0, len(points), chunk)
        ]
    )


def delete_d_recalls(
    features, reference, omitted, *, k: int = 3, chunk: int = 512
) -> tuple[float, np.ndarray]:
    """(recall of `reference` [m,D] by all generated `features` [n,D], recalls [B] without the rows
    `omitted` [B,d]).

    Balls grow as neighbours are left out. Their radii are read from sorted lists of neighbours,
    and a real point is tested against the balls that hold it in some subsample, which are few.
    Raises InputError like `precision_recall`, and where fewer than k + 1 rows stay.
    """
    generated, real = _two_sets(features, reference, k)
    kept = intervals.kept_rows(omitted, len(generated))
    if kept.sum(axis=1).min() <= k:
        raise InputError(
            f"got {len(generated)} images of which {np.shape(omitted)[1]} are left out at a time; "
            f"expected more than k={k} to stay: more images are needed"
        )
    kept = np.concatenate([np.ones((1, len(generated)), bool), kept])
    radii = _subsample_radii(generated, kept, k, chunk)
    widest = radii.max(axis=0)
    covered = np.zeros(len(kept), np.int64)
    for i in range(0, len(real), chunk):
        squared = _squared_distances(real[i : i + chunk], generated)
        rows, columns = _places(squared <= widest)
        squared = squared[rows, columns]
        for b, radius in enumerate(radii):
            covered[b] += np.count_nonzero(np.bincount(rows[squared <= radius[columns]]))
    shares = covered / len(real)
    return float(shares[0]), shares[1:]


def _two_sets(features, reference, k: int) -> tuple[np.ndarray, np.ndarray]:
    generated = finite_features(features, "features")
    real = finite_features(reference, "reference features")
    if k < 1 or min(len(generated), len(real)) <= k or generated.shape[1] != real.shape[1]:
        raise InputError(
            f"got sets of shape {generated.shape} and {real.shape} with k={k}; expected k >= 1, "
            "more than k rows each and equal D"
        )
    return generated, real


def _squared_distances(x, y) -> np.ndarray:
    """|x_i - y_j|^2, [n,m], by the expansion; what cancels to rounding noise is exactly 0."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    x_norms, y_norms = np.sum(x * x, axis=1), np.sum(y * y, axis=1)
    squared = (-2.0 * x) @ y.T
    squared += x_norms[:, None]
    squared += y_norms
    # Few are so small: their own norms are looked at only then.
    rows, columns = _places(squared <= 1e-13 * (x_norms.max() + y_norms.max()))
    noise = squared[rows, columns] <= 1e-13 * (x_norms[rows] + y_norms[columns])
    squared[rows[noise], columns[noise]] = 0.0
    return squared


def _places(flags) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of what is true in `flags` [n,m]: np.nonzero, faster where few are."""
    return np.divmod(np.flatnonzero(flags), flags.shape[1])


def _squared_radii(x, k: int, chunk: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other point, [n]."""
    radii = []
    for i in range(0, len(x), chunk):
        # Position 0 of the sorted row is the point itself, at distance 0.
        radii.append(np.partition(_squared_distances(x[i : i + chunk], x), k, axis=1)[:, k])
    return np.concatenate(radii)


def _subsample_radii(x, kept, k: int, chunk: int) -> np.ndarray:
    """Squared radii [B,n] of the balls among the rows `kept` [B,n]; -1, no ball, for the others."""
    radii = np.full(kept.shape, -1.0)
    listed = min(max(_LISTED, 10 * k), len(x) - 1)
    for i in range(0, len(x), chunk):
        squared = _squared_distances(x[i : i + chunk], x)
        own = np.arange(len(squared))
        squared[own, i + own] = np.inf  # the point itself, whatever its duplicates
        near = np.argpartition(squared, listed - 1, axis=1)[:, :listed]
        lengths = np.take_along_axis(squared, near, axis=1)
        order = np.argsort(lengths, axis=1)
        near, lengths = (np.take_along_axis(a, order, axis=1) for a in (near, lengths))
        for b, stays in enumerate(kept):
            place = np.argmax(np.cumsum(stays[near], axis=1) >= k, axis=1)
            radius = lengths[own, place]
            radii[b, i : i + chunk] = np.where(stays[i : i + chunk], radius, -1.0)
    return radii

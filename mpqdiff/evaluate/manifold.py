"""Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1): the k-NN manifold estimate.

A set's manifold is the union of the balls around its points that reach to their k-th nearest
neighbour. Precision: share of generated points inside the real manifold (fidelity). Recall:
share of real points inside the generated manifold (coverage). Both depend on the set sizes;
compare at equal sizes. Distances are float64, in chunks of rows.
"""

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate.frechet import finite_features


def precision_recall(features, reference, *, k: int = 3, chunk: int = 1024) -> tuple[float, float]:
    """(precision, recall) of generated `features` [n,D] against real `reference` [m,D].

    Raises InputError unless k >= 1, both sets have more than k rows, equal D and finite values.
    """
    generated = finite_features(features, "features")
    real = finite_features(reference, "reference features")
    if k < 1 or min(len(generated), len(real)) <= k or generated.shape[1] != real.shape[1]:
        raise InputError(
            f"got sets of shape {generated.shape} and {real.shape} with k={k}; expected k >= 1, "
            "more than k rows each and equal D"
        )
    precision = _share_inside(generated, real, _squared_radii(real, k, chunk), chunk)
    recall = _share_inside(real, generated, _squared_radii(generated, k, chunk), chunk)
    return precision, recall


def _squared_distances(x, y) -> np.ndarray:
    """|x_i - y_j|^2, [n,m], by the expansion; what cancels to rounding noise is exactly 0."""
    norms = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)
    squared = norms - 2.0 * (x @ y.T)
    squared[squared <= 1e-13 * norms] = 0.0
    return squared


def _squared_radii(x, k: int, chunk: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other point, [n]."""
    radii = []
    for i in range(0, len(x), chunk):
        # Position 0 of the sorted row is the point itself, at distance 0.
        radii.append(np.partition(_squared_distances(x[i : i + chunk], x), k, axis=1)[:, k])
    return np.concatenate(radii)


def _share_inside(points, centres, squared_radii, chunk: int) -> float:
    """Share of `points` within the ball of at least one of `centres`."""
    inside = 0
    for i in range(0, len(points), chunk):
        near = _squared_distances(points[i : i + chunk], centres) <= squared_radii
        inside += int(np.count_nonzero(near.any(axis=1)))
    return inside / len(points)

"""Improved precision and recall: plain-loop oracle, known configurations, duplicates."""

import math

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate.manifold import precision_recall


def _slow_share(points, centres, k):
    """Share of points inside the union of k-NN balls, one pair at a time."""
    radii = []
    for i, centre in enumerate(centres):
        others = sorted(math.dist(centre, other) for j, other in enumerate(centres) if j != i)
        radii.append(others[k - 1])
    inside = 0
    for point in points:
        inside += any(math.dist(point, c) <= r for c, r in zip(centres, radii, strict=True))
    return inside / len(points)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("k", [1, 3])
def test_equals_the_plain_loops(k, chunk):
    rng = np.random.default_rng(k)
    generated = rng.normal(0.7, 0.6, (40, 3))
    real = rng.normal(0.0, 1.0, (50, 3))
    precision, recall = precision_recall(generated, real, k=k, chunk=chunk)
    assert precision == _slow_share(generated, real, k)
    assert recall == _slow_share(real, generated, k)
    assert 0.0 < recall < precision < 1.0


def test_same_set_gives_one_and_distant_sets_zero():
    x = np.random.default_rng(0).normal(100.0, 1.0, (30, 6))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x + 1000.0, x) == (0.0, 0.0)


def test_a_dropped_mode_costs_recall_only():
    rng = np.random.default_rng(1)
    real = np.concatenate([rng.normal(0, 1, (60, 2)), rng.normal(50, 1, (60, 2))])
    precision, recall = precision_recall(real[:60] + 1e-3, real)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_duplicates_have_balls_of_radius_zero_that_hold_themselves():
    real = np.repeat(np.random.default_rng(2).normal(30.0, 1.0, (50, 64)), 5, axis=0)
    for chunk in (7, 1024):
        assert precision_recall(real[::5].repeat(2, axis=0), real, chunk=chunk) == (1.0, 1.0)
    # Closer than the expansion of |x - y|^2 can tell apart from equal.
    assert precision_recall(real * (1.0 + 1e-9), real) == (1.0, 1.0)
    assert precision_recall(real + 1e-3, real)[0] == 0.0


def test_unusable_input():
    x = np.random.default_rng(3).normal(size=(4, 2))
    with pytest.raises(InputError, match="more than k rows"):
        precision_recall(x[:3], x)
    with pytest.raises(InputError, match="k=0"):
        precision_recall(x, x, k=0)
    with pytest.raises(InputError, match="equal D"):
        precision_recall(x[:, :1], x)

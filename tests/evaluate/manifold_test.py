"""Improved precision and recall: plain-loop oracle, known configurations, duplicates."""

import math

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate import intervals, manifold
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


@pytest.mark.parametrize("listed", [50, 7])
def test_delete_d_recall_equals_recomputing_from_the_kept_rows(monkeypatch, listed):
    """7 neighbours listed are enough where 4 rows are left out."""
    monkeypatch.setattr(manifold, "_LISTED", listed)
    rng = np.random.default_rng(4)
    generated, real = rng.normal(0.5, 0.7, (60, 4)), rng.normal(size=(45, 4))
    generated[:4] = generated[4]  # duplicates have balls of radius 0 until one is left out
    omitted = intervals.omissions(60, seed=1, draws=12, fraction=0.07)
    expected = [
        precision_recall(np.delete(generated, rows, axis=0), real, k=3)[1] for rows in omitted
    ]
    for chunk in (7, 1024):
        whole, found = manifold.delete_d_recalls(generated, real, omitted, k=3, chunk=chunk)
        np.testing.assert_array_equal(found, expected)
        assert whole == precision_recall(generated, real, k=3)[1]
    assert len(set(expected)) > 1


def test_the_jackknife_of_recall_gives_the_scatter_over_fresh_samples():
    rng = np.random.default_rng(5)
    real = rng.normal(size=(150, 6))
    samples = [rng.normal(0.0, 0.8, (150, 6)) for _ in range(150)]
    omitted = intervals.omissions(150, seed=0)
    errors = []
    for x in samples[:20]:
        _, values = manifold.delete_d_recalls(x, real, omitted)
        errors.append(intervals.jackknife_interval(0.0, values, n=150, d=30).half_width / 2)
    scatter = np.std([precision_recall(x, real)[1] for x in samples])
    assert 0.7 < np.mean(errors) / scatter < 1.5


def test_inside_says_which_images_count():
    rng = np.random.default_rng(6)
    generated, real = rng.normal(0.7, 0.6, (40, 3)), rng.normal(size=(50, 3))
    flags = manifold.inside(generated, real)
    assert flags.dtype == bool
    assert (flags.mean(), manifold.inside(real, generated).mean()) == precision_recall(
        generated, real
    )


def test_unusable_input():
    x = np.random.default_rng(3).normal(size=(4, 2))
    with pytest.raises(InputError, match="more than k rows"):
        precision_recall(x[:3], x)
    with pytest.raises(InputError, match="k=0"):
        precision_recall(x, x, k=0)
    with pytest.raises(InputError, match="equal D"):
        precision_recall(x[:, :1], x)
    with pytest.raises(InputError, match="more than k=3 to stay"):
        manifold.delete_d_recalls(x, x, np.zeros((2, 1), int))

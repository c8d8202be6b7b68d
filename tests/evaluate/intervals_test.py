"""Intervals: t quantiles against scipy, coverage, and why FID gets no plain bootstrap."""

import time

import numpy as np
import pytest
from scipy import stats

from mpqdiff.errors import InputError
from mpqdiff.evaluate import features, frechet, intervals

DIMENSIONS = 16


def _features(rng, n, scale=1.0):
    """Rectified Gaussians, as the features of a classifier are."""
    mixing = np.random.default_rng(99).normal(size=(DIMENSIONS, DIMENSIONS)) / 4
    return np.maximum(scale * rng.normal(size=(n, DIMENSIONS)) @ mixing, 0.0)


def _reference():
    return frechet.target(*frechet.moments(_features(np.random.default_rng(100), 20000)))


def _fid_interval(x, reference, seed=0):
    omitted = intervals.omissions(len(x), seed=seed)
    values = frechet.delete_d_fids(x, reference, omitted)
    return intervals.jackknife_interval(
        frechet.fid(x, reference), values, n=len(x), d=omitted.shape[1]
    )


@pytest.mark.parametrize("dof", [1, 2, 3, 10, 255, 4999])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_t_quantile_equals_scipys(dof, level):
    expected = stats.t.ppf((1 + level) / 2, dof)
    assert intervals.t_quantile(dof, level) == pytest.approx(expected, rel=1e-5)


def test_mean_interval_equals_scipys():
    x = np.random.default_rng(7).exponential(1.0, 5)
    interval = intervals.mean_interval(x)
    expected = stats.t.interval(0.95, 4, x.mean(), stats.sem(x))
    assert interval.ends == pytest.approx(list(expected), rel=1e-5)
    assert interval.value == pytest.approx(x.mean())


def test_mean_interval_covers_at_the_stated_rate():
    rng = np.random.default_rng(0)
    hits = [intervals.mean_interval(rng.normal(3.0, 2.0, 6)).contains(3.0) for _ in range(1000)]
    assert 0.93 < np.mean(hits) < 0.97


def test_omissions_are_distinct_rows_fixed_by_the_seed():
    omitted = intervals.omissions(50, seed=1, draws=30)
    assert omitted.shape == (30, 10)
    assert all(len(set(rows)) == 10 for rows in omitted.tolist())
    assert omitted.min() == 0
    assert omitted.max() == 49
    np.testing.assert_array_equal(omitted, intervals.omissions(50, seed=1, draws=30))
    assert not np.array_equal(omitted, intervals.omissions(50, seed=2, draws=30))


def test_jackknife_of_a_mean_is_the_usual_standard_error():
    x = np.random.default_rng(2).exponential(1.0, 400)
    omitted = intervals.omissions(400, seed=0, draws=4000)
    values = [np.delete(x, rows).mean() for rows in omitted]
    interval = intervals.jackknife_interval(x.mean(), values, n=400, d=80)
    expected = 1.96 * x.std(ddof=1) / np.sqrt(400)
    assert interval.half_width == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("scale", "most"), [(1.0, 2.0), (1.2, 1.35), (2.0, 1.3)])
def test_fid_interval_matches_the_scatter_over_fresh_samples(scale, most):
    """Conservative near the floor (scale 1 is the reference itself), right away from it."""
    reference, rng = _reference(), np.random.default_rng(3)
    samples = [_features(rng, 256, scale) for _ in range(120)]
    scatter = np.std([frechet.fid(x, reference) for x in samples])
    errors = [_fid_interval(x, reference).half_width / 1.96 for x in samples[:20]]
    assert 0.8 < np.mean(errors) / scatter < most


def test_a_plain_bootstrap_of_fid_excludes_its_own_estimate_and_ours_does_not():
    reference, rng = _reference(), np.random.default_rng(4)
    x = _features(rng, 256)
    point = frechet.fid(x, reference)
    bootstrap = [frechet.fid(x[rng.integers(0, 256, 256)], reference) for _ in range(200)]
    assert np.quantile(bootstrap, 0.025) > point
    ours = _fid_interval(x, reference)
    assert ours.value == point
    assert ours.low < point < ours.high
    assert (ours.low + ours.high) / 2 == pytest.approx(point)


def test_on_real_features_a_plain_bootstrap_lies_above_its_estimate_too():
    """Held-out images against the training images in the shipped feature space: an honest
    bootstrap would have half of its values below the estimate."""
    shipped = features.load_reference()
    reference = frechet.target(shipped.train_mean, shipped.train_cov)
    rng = np.random.default_rng(0)
    drawn = [shipped.test_features[rng.permutation(5000)[:256]] for _ in range(40)]
    points = np.array([frechet.fid(x, reference) for x in drawn])
    below, ratio, ours = [], [], []
    for x, point in zip(drawn[:10], points, strict=False):
        bootstrap = [frechet.fid(x[rng.integers(0, 256, 256)], reference) for _ in range(60)]
        below.append(np.mean(np.array(bootstrap) < point))
        ratio.append(np.median(bootstrap) / point)
        ours.append(_fid_interval(x, reference))
    assert np.mean(below) < 0.1
    assert np.mean(ratio) > 1.5
    assert np.mean([interval.contains(points.mean()) for interval in ours]) >= 0.9


def test_cheap_and_narrower_with_more_images():
    reference, rng = _reference(), np.random.default_rng(5)
    x = _features(rng, 5000, 1.2)
    start = time.perf_counter()
    wide, narrow = _fid_interval(x[:256], reference), _fid_interval(x, reference)
    assert time.perf_counter() - start < 2.0
    assert narrow.half_width < 0.4 * wide.half_width


def test_kept_rows_are_those_not_omitted():
    omitted = intervals.omissions(20, seed=3, draws=5)
    kept = intervals.kept_rows(omitted, 20)
    for row, out in zip(kept, omitted, strict=True):
        assert set(np.flatnonzero(row)) == set(range(20)) - set(out)


def test_influences_of_a_mean_give_its_t_interval():
    x = np.random.default_rng(8).exponential(1.0, 30)
    ours = intervals.influence_interval(x.mean(), x - x.mean())
    assert ours.ends == pytest.approx(intervals.mean_interval(x).ends)


@pytest.mark.parametrize(("count", "n"), [(0, 20), (20, 20), (7, 20), (1, 3), (450, 1000)])
def test_proportion_interval_equals_scipys(count, n):
    ours = intervals.proportion_interval(count, n)
    expected = stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
    assert ours.ends == pytest.approx([expected.low, expected.high], abs=1e-9)
    assert ours.low <= ours.value <= ours.high
    assert ours.high - ours.low > 0.05


def test_unusable_input():
    with pytest.raises(InputError, match="n=2"):
        intervals.omissions(2, seed=0)
    with pytest.raises(InputError, match="n >= 2"):
        intervals.mean_interval([1.0])
    with pytest.raises(InputError, match="finite"):
        intervals.mean_interval([1.0, np.inf])
    with pytest.raises(InputError, match="dof=0"):
        intervals.t_quantile(0)
    with pytest.raises(InputError, match="more images"):
        intervals.jackknife_interval(1.0, [1.0, np.nan], n=5, d=1)
    with pytest.raises(InputError, match="got 5 of 4"):
        intervals.proportion_interval(5, 4)

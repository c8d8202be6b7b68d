"""Frechet distance: closed forms, scipy's matrix root, rank-deficient covariances, delete-d."""

import time

import numpy as np
import pytest
from scipy import linalg

from mpqdiff.errors import InputError
from mpqdiff.evaluate import frechet, intervals


def _scipy_distance(mu1, cov1, mu2, cov2):
    root = np.real(linalg.sqrtm(cov1 @ cov2))
    return np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * root)


def _rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def test_moments_equal_numpys():
    x = np.random.default_rng(0).normal(3.0, 2.0, (50, 7)).astype(np.float32)
    mean, cov = frechet.moments(x)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_scalar_gaussians_have_the_closed_form():
    # |3 - 1|^2 + (2 - 5)^2
    assert frechet.frechet_distance([3.0], [[4.0]], [1.0], [[25.0]]) == pytest.approx(13.0)


@pytest.mark.parametrize("n", [500, 65, 40, 3])
def test_equals_scipy_sqrtm(n):
    """Below 65 rows both covariances are singular; scipy then needs a nudge off the boundary."""
    rng = np.random.default_rng(n)
    mixing = rng.normal(size=(64, 64))
    first = frechet.moments(rng.normal(size=(n, 64)) @ mixing)
    second = frechet.moments(rng.normal(0.3, 1.5, size=(n, 64)) @ mixing)
    ours = frechet.frechet_distance(*first, *second)
    nudge = 0.0 if n > 64 else 1e-13 * np.trace(first[1]) * np.eye(64)
    expected = _scipy_distance(first[0], first[1] + nudge, second[0], second[1] + nudge)
    assert ours == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ranks", [(64, 64), (20, 64), (20, 20), (0, 5)])
def test_commuting_covariances_have_the_closed_form(ranks):
    """In a shared eigenbasis the distance is sum (sqrt(a) - sqrt(b))^2, whatever the ranks."""
    rng = np.random.default_rng(sum(ranks))
    basis = _rotation(rng, 64)
    a, b = (np.where(np.arange(64) < r, rng.uniform(0.1, 9.0, 64), 0.0) for r in ranks)
    covs = [(basis * values) @ basis.T for values in (a, b)]
    ours = frechet.frechet_distance(np.zeros(64), covs[0], np.ones(64), covs[1])
    assert ours == pytest.approx(64 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-9)


def test_symmetric_zero_at_itself_and_rotation_invariant():
    rng = np.random.default_rng(1)
    first = frechet.moments(rng.normal(size=(30, 40)))
    second = frechet.moments(rng.normal(1.0, 2.0, size=(300, 40)))
    distance = frechet.frechet_distance(*first, *second)
    assert frechet.frechet_distance(*second, *first) == pytest.approx(distance, rel=1e-9)
    assert 0.0 <= frechet.frechet_distance(*first, *first) < 1e-9 * distance
    turn = _rotation(rng, 40)
    turned = [(mean @ turn, turn.T @ cov @ turn) for mean, cov in (first, second)]
    assert frechet.frechet_distance(*turned[0], *turned[1]) == pytest.approx(distance, rel=1e-9)


def test_delete_d_equals_recomputing_from_the_kept_rows():
    rng = np.random.default_rng(2)
    x = rng.normal(5.0, 1.0, (60, 8))
    reference = frechet.target(*frechet.moments(rng.normal(4.0, 2.0, (100, 8))))
    omitted = np.stack([rng.permutation(60)[:12] for _ in range(5)])
    expected = [frechet.fid(np.delete(x, rows, axis=0), reference) for rows in omitted]
    np.testing.assert_allclose(frechet.delete_d_fids(x, reference, omitted), expected, rtol=1e-9)


def test_unusable_input_says_what_is_wrong():
    x = np.ones((10, 3))
    x[[2, 7], 1] = np.nan
    with pytest.raises(InputError, match="2 of 10 rows"):
        frechet.moments(x)
    with pytest.raises(InputError, match="at least 2"):
        frechet.moments(np.ones((1, 3)))
    with pytest.raises(InputError, match="feature space"):
        frechet.frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(InputError, match="not symmetric"):
        frechet.target(np.zeros(2), [[1.0, 0.5], [0.0, 1.0]])
    with pytest.raises(InputError, match="expected \\[D\\]"):
        frechet.target(np.zeros(2), np.eye(3))


def _drawn(rng, n, size=24, scale=1.2):
    mixing = np.random.default_rng(99).normal(size=(size, size)) / np.sqrt(size)
    return np.maximum(scale * rng.normal(size=(n, size)) @ mixing, 0.0)


@pytest.mark.parametrize("n", [200, 15])
def test_influence_is_the_slope_of_the_distance_in_an_images_weight(n):
    """Against central differences of the distance with one image's weight moved; n < D too."""
    rng = np.random.default_rng(5)
    x = _drawn(rng, n)
    reference = frechet.target(*frechet.moments(_drawn(rng, 3000, scale=1.0)))
    found = frechet.linearised(x, reference)
    assert found.value == pytest.approx(frechet.fid(x, reference), rel=1e-9)
    assert found.rank == min(n - 1, 24)
    assert found.influence.mean() == pytest.approx(0.0, abs=1e-9)

    def weighted(image, step):
        weights = np.full(n, (1 - step) / n)
        weights[image] += step
        mean = weights @ x
        cov = (x - mean).T @ ((x - mean) * weights[:, None]) * n / (n - 1)
        return frechet.distance_to(reference, mean, cov)

    step = 1e-5
    for image in (0, 7):
        slope = (weighted(image, step) - weighted(image, -step)) / (2 * step)
        assert found.influence[image] == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(("n", "scale", "most"), [(60, 1.2, 2.0), (400, 1.2, 1.5), (400, 2.0, 1.3)])
def test_influences_give_the_scatter_over_fresh_samples(n, scale, most):
    rng = np.random.default_rng(6)
    reference = frechet.target(*frechet.moments(_drawn(rng, 20000, scale=1.0)))
    found = [frechet.linearised(_drawn(rng, n, scale=scale), reference) for _ in range(150)]
    errors = [intervals.influence_interval(0.0, one.influence).half_width / 2 for one in found]
    scatter = np.std([one.value for one in found])
    assert 0.85 < np.mean(errors) / scatter < most


def test_high_dimensions_take_influences_and_agree_with_the_subsamples(monkeypatch):
    rng = np.random.default_rng(7)
    x, base = _drawn(rng, 300), _drawn(rng, 300)
    reference = frechet.target(*frechet.moments(_drawn(rng, 3000, scale=1.0)))
    omitted = intervals.omissions(300, seed=0)
    widths = []
    for limit in (256, 8):
        monkeypatch.setattr(frechet, "SUBSAMPLED_DIMENSIONS", limit)
        whole, terms = frechet.terms(x, reference, omitted)
        other, base_terms = frechet.terms(base, reference, omitted)
        assert terms is not None
        assert terms.shape == (200 if limit == 256 else 300,)
        ends = frechet.ends(whole.value, terms, x, omitted)
        delta = frechet.ends(whole.value - other.value, terms - base_terms, x, omitted)
        widths.append([np.ptp(ends), np.ptp(delta)])
    np.testing.assert_allclose(widths[0], widths[1], rtol=0.2)
    assert frechet.terms(x, reference, None)[1] is None


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_fid_infinity_takes_the_bias_away(scale):
    """Gaussians, so that the distance at infinitely many images is known."""
    mixing = np.random.default_rng(99).normal(size=(16, 16)) / 4
    cov = mixing @ mixing.T
    reference = frechet.target(np.zeros(16), cov)
    truth = frechet.frechet_distance(np.zeros(16), scale**2 * cov, np.zeros(16), cov)
    rng = np.random.default_rng(8)
    samples = [scale * rng.normal(size=(256, 16)) @ mixing.T for _ in range(60)]
    found = [frechet.fid_infinity(x, reference) for x in samples]
    biased = np.mean([frechet.fid(x, reference) for x in samples]) - truth
    assert abs(np.mean([one.value for one in found]) - truth) < 0.1 * biased
    errors = [intervals.influence_interval(0.0, one.influence).half_width / 2 for one in found]
    assert 0.8 < np.mean(errors) / np.std([one.value for one in found]) < 2.0
    assert found[0].value == frechet.fid_infinity(samples[0], reference).value


def test_fid_infinity_refuses_few_images():
    x = np.random.default_rng(9).normal(size=(100, 16))
    reference = frechet.target(np.zeros(16), np.eye(16))
    with pytest.raises(InputError, match=r"100 images in 16 dimensions.*128 images"):
        frechet.fid_infinity(x, reference)
    with pytest.raises(InputError, match="parts=1"):
        frechet.fid_infinity(x, reference, parts=1)


@pytest.mark.slow
def test_the_distance_at_2048_dimensions_takes_less_than_10_seconds_of_2_cores():
    """In processor time, so that other programs on the machine do not count."""
    rng = np.random.default_rng(10)
    decay = np.exp(-np.arange(2048) / 300)
    first, second = (frechet.moments(rng.normal(size=(4000, 2048)) * decay) for _ in range(2))
    start = time.process_time()
    distance = frechet.frechet_distance(*first, *second)
    assert time.process_time() - start < 20.0
    assert distance > 0.0

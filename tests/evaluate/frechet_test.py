"""Frechet distance: closed forms, scipy's matrix root, rank-deficient covariances, delete-d."""

import numpy as np
import pytest
from scipy import linalg

from mpqdiff.errors import InputError
from mpqdiff.evaluate import frechet


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


def test_agrees_with_torchmetrics():
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Identity(torch.nn.Module):
        num_features = 16

        def forward(self, x):
            return x.flatten(1)

    rng = np.random.default_rng(3)
    first, second = (rng.normal(m, 1.0, (200, 1, 4, 4)).astype(np.float32) for m in (0.0, 0.5))
    metric = fid.FrechetInceptionDistance(feature=Identity(), input_img_size=(1, 4, 4))
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(first).double(), real=True)
    metric.update(torch.from_numpy(second).double(), real=False)
    moments = [frechet.moments(x.reshape(200, 16)) for x in (first, second)]
    ours = frechet.frechet_distance(*moments[0], *moments[1])
    assert ours == pytest.approx(float(metric.compute()), rel=1e-5)

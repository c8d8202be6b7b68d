"""Principal directions: the Gram of few rows against the covariance, invariances, streaming."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.evaluate import statistics
from mpqdiff.sensitivity import subspace

seeds = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=40, deadline=None)


def _rows(seed, rows, features, rank=None):
    """Rows of uneven variance around a mean, of `rank` where it is given."""
    rng = np.random.default_rng(seed)
    rank = rank or features
    basis = rng.normal(size=(rank, features)) * 0.7 ** np.arange(rank)[:, None]
    return rng.normal(size=(rows, rank)) @ basis + rng.normal(size=features)


def _moments(rows):
    return rows.mean(axis=0), np.cov(rows.T, bias=True).reshape(rows.shape[1], rows.shape[1])


def _rotation(seed, size):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


@QUICK
@given(seeds, st.integers(2, 30), st.integers(1, 30))
def test_rows_and_covariance_give_the_same_directions(seed, count, features):
    rows = _rows(seed, count, features)
    mean, cov = _moments(rows)
    own, whole = subspace.principal_of_rows(rows), subspace.principal(mean, cov)
    r = len(own.values)
    assert r <= features
    assert count >= features or r <= count - 1
    np.testing.assert_allclose(own.mean, mean)
    np.testing.assert_allclose(own.values, whole.values[:r], atol=1e-8 * whole.values[0])
    np.testing.assert_allclose(own.vectors.T @ own.vectors, np.eye(r), atol=1e-5)
    rebuilt = (own.vectors * own.values) @ own.vectors.T
    np.testing.assert_allclose(rebuilt, cov, atol=1e-7 * whole.values[0])
    assert np.all(np.diff(whole.values) <= 0)


@QUICK
@given(seeds, st.integers(2, 24), st.floats(0.5, 1.0), st.floats(1e-3, 1e3))
def test_k_is_unchanged_by_a_rotation_and_by_a_scale(seed, features, share, scale):
    rows = _rows(seed, 3 * features, features)
    turned = scale * rows @ _rotation(seed, features)
    own, other = subspace.principal(*_moments(rows)), subspace.principal(*_moments(turned))
    k = [subspace.intrinsic_dimension(each.values, share=share) for each in (own, other)]
    assert k[0] == k[1]
    held = own.values[: k[0]].sum() / own.values.sum()
    assert held >= share * (1 - 1e-8)
    assert k[0] == 1 or own.values[: k[0] - 1].sum() / own.values.sum() < share


@pytest.mark.parametrize("seed", range(5))
def test_k_of_equal_eigenvalues_survives_a_rotation(seed):
    # 19 of 20 equal eigenvalues hold 0.95 of the variance exactly: the count is at an edge.
    turn = _rotation(seed, 20)
    own = subspace.principal(np.zeros(20), turn @ turn.T)
    assert subspace.intrinsic_dimension(own.values) == 19


@QUICK
@given(seeds, st.integers(1, 12), st.integers(12, 40), st.booleans())
def test_k_is_at_most_the_rank(seed, rank, features, few):
    rows = _rows(seed, features // 2 + rank if few else 3 * features, features, rank)
    own = subspace.principal_of_rows(rows)
    assert subspace.intrinsic_dimension(own.values) <= rank
    assert subspace.intrinsic_dimension(own.values, share=1.0) <= rank


def test_white_noise_fills_its_features():
    rows = np.random.default_rng(0).normal(size=(20_000, 40))
    own = subspace.principal_of_rows(rows)
    assert subspace.intrinsic_dimension(own.values) / 40 >= 0.9


@pytest.mark.parametrize(
    ("values", "share", "k"),
    [
        ([90.0, 5.0, 5.0], 0.95, 2),
        ([94.9, 5.0, 0.1], 0.95, 2),
        ([95.0, 5.0], 0.95, 1),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
        ([1.0, 1.0, 1.0, 0.0], 1.0, 3),
    ],
)
def test_k_by_hand(values, share, k):
    assert subspace.intrinsic_dimension(values, share=share) == k


@QUICK
@given(seeds, st.lists(st.integers(0, 12), min_size=2, max_size=6))
def test_moments_streamed_and_merged_give_the_directions_of_the_whole(seed, sizes):
    rows = _rows(seed, sum(sizes) + 2, 6)
    parts = [statistics.empty(6).update(part) for part in np.split(rows, np.cumsum(sizes))]
    streamed = statistics.empty(6)
    for part in parts[::-1]:
        streamed = streamed.merge(part)
    own = subspace.principal(streamed.mean, streamed.m2 / streamed.count)
    whole = subspace.principal(*_moments(rows))
    np.testing.assert_allclose(own.values, whole.values, atol=1e-9 * whole.values[0])
    k = [subspace.intrinsic_dimension(each.values) for each in (own, whole)]
    assert k[0] == k[1]


@QUICK
@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_pooled_moments_are_those_of_all_rows(seed, timesteps, features):
    parts = [_rows(seed + t, 7, features) + t for t in range(timesteps)]
    means, covs = zip(*map(_moments, parts), strict=True)
    mean, cov = subspace.pooled(means, covs)
    expected = _moments(np.concatenate(parts))
    np.testing.assert_allclose(mean, expected[0])
    np.testing.assert_allclose(cov, expected[1], atol=1e-10)


def test_basis_is_cut_at_k():
    own = subspace.principal(np.zeros(3), np.diag([5.0, 90.0, 5.0]))
    assert subspace.basis(own).shape == (3, 2)
    np.testing.assert_allclose(np.abs(subspace.basis(own, share=0.9)[:, 0]), [0, 1, 0])


def _broken(entry):
    cov = np.eye(3)
    cov[0, 1] = entry
    return cov


@pytest.mark.parametrize(
    ("mean", "cov", "message"),
    [
        (np.zeros(3), _broken(np.nan), "NaN or infinity"),
        (np.array([0, np.inf, 0]), np.eye(3), "NaN or infinity"),
        (np.zeros(3), _broken(0.5), "transpose by 0.5"),
        (np.zeros(3), np.diag([1.0, 1.0, -0.5]), "no covariance"),
        (np.zeros(2), np.eye(3), "expected"),
        (np.zeros(0), np.zeros((0, 0)), "expected"),
        (np.ones(3), np.zeros((3, 3)), "all 3 features are constant"),
        (np.ones(3), 1e-14 * np.eye(3), "all 3 features are constant"),
    ],
)
def test_moments_that_cannot_be_used(mean, cov, message):
    with pytest.raises(InputError, match=message):
        subspace.principal(mean, cov)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((4, 9), 0.1, np.float32), "constant"),
        (np.full((9, 4), 0.1, np.float32), "constant"),
        (np.array([[1.0, np.nan], [0, 1]]), "NaN or infinity"),
        (np.ones((1, 4)), "N >= 2"),
        (np.ones(4), "N >= 2"),
    ],
)
def test_rows_that_cannot_be_used(rows, message):
    with pytest.raises(InputError, match=message):
        subspace.principal_of_rows(rows)


def test_one_feature_that_varies_is_enough():
    own = subspace.principal(np.full(3, 100.0), np.diag([0.0, 1.0, 0.0]))
    assert subspace.intrinsic_dimension(own.values) == 1


@pytest.mark.parametrize(
    ("values", "share"),
    [([1.0], 0.0), ([1.0], 1.1), ([0.0], 0.95), ([1.0, -1.0], 0.95), ([np.nan], 0.95), ([], 0.5)],
)
def test_eigenvalues_and_shares_that_cannot_be_used(values, share):
    with pytest.raises(InputError):
        subspace.intrinsic_dimension(values, share=share)


def test_timesteps_of_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"\[T,D\]"):
        subspace.pooled(np.zeros((2, 3)), np.zeros((2, 3)))

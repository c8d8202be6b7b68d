"""The manifold signals: by hand in planes, their invariances, and a fragile site ranked first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.sensitivity import manifold, ranking
from mpqdiff.sensitivity.subspace import principal

seeds = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=30, deadline=None)


def _moments(rows):
    return rows.mean(axis=0), np.cov(rows.T, bias=True).reshape(rows.shape[1], rows.shape[1])


def _quantised(rows, bits):
    step = np.abs(rows).max() / (2 ** (bits - 1) - 1)
    return np.round(rows / step) * step


def _outputs(seed, features, rank, rows=200):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank, features)) * 0.8 ** np.arange(rank)[:, None]
    return rng.normal(size=(rows, rank)) @ mixing + 0.3 * rng.normal(size=features)


def _signals(y, other):
    """Every signal of float outputs y and quantised ones, [m,D] both, by name."""
    own, turned = principal(*_moments(y)), principal(*_moments(other))
    error = (other - y).T @ (other - y) / len(y)
    (mean, cov), (q_mean, q_cov) = _moments(y), _moments(other)
    return {
        "energy": manifold.energy(mean, cov),
        "dimension": manifold.dimension(own),
        "leak": manifold.pca_leak(own, error),
        "rotate": manifold.pca_rotate(own, turned),
        "concentration": manifold.pca_concentration(own),
        "growth": manifold.growth([mean], [cov], [q_mean], [q_cov])[0],
        "relative_error": manifold.relative_error(mean, cov, error),
    }


@QUICK
@given(seeds, st.integers(2, 12), st.integers(2, 12), st.integers(3, 8))
def test_all_signals_are_unchanged_by_a_rotation_of_the_features(seed, features, rank, bits):
    y = _outputs(seed, features, min(rank, features))
    other = _quantised(y, bits)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(features, features)))[0]
    plain, turned = _signals(y, other), _signals(y @ turn, other @ turn)
    for name, value in plain.items():
        np.testing.assert_allclose(turned[name], value, atol=1e-7, err_msg=name)


@QUICK
@given(seeds, st.integers(1, 10), st.integers(3, 8))
def test_signals_are_those_of_the_rows(seed, features, bits):
    y = _outputs(seed, features, features)
    other, own = _quantised(y, bits), principal(*_moments(y))
    found = _signals(y, other)
    k = round(found["dimension"] * features)
    v, centre = own.vectors[:, :k], y.mean(axis=0)
    inside = np.mean(np.sum(((y - centre) @ v) ** 2, axis=1))
    error = np.mean(np.sum(((other - y) @ v) ** 2, axis=1))
    off = [
        np.sum((rows - centre - (rows - centre) @ v @ v.T) ** 2) / np.sum((rows - centre) ** 2)
        for rows in (y, other)
    ]
    np.testing.assert_allclose(found["energy"], np.log10(np.mean(np.sum(y**2, axis=1))))
    np.testing.assert_allclose(found["leak"], error / inside)
    np.testing.assert_allclose(found["growth"], max(0, off[1] - off[0]), atol=2e-9)
    np.testing.assert_allclose(found["relative_error"], np.sum((other - y) ** 2) / np.sum(y**2))
    turned = principal(*_moments(other)).vectors[:, :k]
    apart = np.linalg.norm(v @ v.T - turned @ turned.T) / np.sqrt(2 * k)
    np.testing.assert_allclose(found["rotate"], apart, atol=1e-7)


@QUICK
@given(seeds, st.integers(2, 10))
def test_without_quantisation_nothing_moves(seed, features):
    y = _outputs(seed, features, features)
    found = _signals(y, y)
    assert found["leak"] == found["growth"] == found["relative_error"] == 0
    assert found["rotate"] < 1e-7


def test_energy_of_signs_is_the_number_of_features():
    rows = np.sign(np.random.default_rng(0).normal(size=(50, 10)))
    assert manifold.energy(*_moments(rows)) == pytest.approx(1.0)


@pytest.mark.parametrize("degrees", [0, 30, 60, 90])
def test_two_lines_are_apart_by_the_sine_of_their_angle(degrees):
    angle = np.deg2rad(degrees)
    line = np.array([np.cos(angle), np.sin(angle)])
    own = principal(np.zeros(2), np.diag([1.0, 0.01]))
    other = principal(np.zeros(2), np.outer(line, line) + 0.01 * np.eye(2))
    assert manifold.pca_rotate(own, other) == pytest.approx(np.sin(angle), abs=1e-9)


def test_leak_counts_the_error_inside_alone():
    own = principal(np.zeros(3), np.diag([4.0, 2.0, 0.001]))
    assert manifold.pca_leak(own, np.diag([0.0, 0.0, 9.0])) == pytest.approx(0)
    assert manifold.pca_leak(own, np.diag([0.3, 0.3, 9.0])) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("variances", "expected"), [([1, 1, 1, 1], 0), ([1, 0, 0, 0], 1), ([1, 1, 0, 0], 0.5), ([3], 1)]
)
def test_concentration_of_even_and_single_directions(variances, expected):
    own = principal(np.zeros(len(variances)), np.diag(np.array(variances, float)))
    assert manifold.pca_concentration(own) == pytest.approx(expected, abs=1e-12)


def test_growth_by_hand_and_against_the_manifold_of_all_timesteps():
    # A line along x at one timestep, along y at the other; the error is along y.
    means, covs = np.zeros((2, 2)), np.array([np.diag([1.0, 0.0]), np.diag([0.0, 1.0])])
    worse = covs + np.diag([0.0, 1.0])
    np.testing.assert_allclose(manifold.growth(means, covs, means, worse), [0.5, 0])
    # Over both timesteps the manifold is the whole plane.
    np.testing.assert_array_equal(
        manifold.growth(means, covs, means, worse, manifold="pooled"), [0, 0]
    )
    # A shift of the mean off the line counts like a spread off it.
    moved = manifold.growth(means[:1], covs[:1], [[0.0, 1.0]], covs[:1])
    np.testing.assert_allclose(moved, [0.5])


@pytest.mark.parametrize("seed", range(5))
def test_a_change_within_the_manifold_is_no_growth_but_for_rounding(seed):
    y = _outputs(seed, 12, 3)
    own, stretched = _moments(y), _moments(y + 0.1 * (y - y.mean(axis=0)) + 0.2 * (y[0] - y[1]))
    found = manifold.growth([own[0]], [own[1]], [stretched[0]], [stretched[1]], share=1.0)
    assert found.tolist() == [0]


def test_the_relative_error_falls_fourfold_with_a_bit():
    y = np.random.default_rng(1).uniform(-1, 1, size=(4000, 4))
    q = {bits: _signals(y, _quantised(y, bits))["relative_error"] for bits in (4, 6)}
    assert q[4] / q[6] == pytest.approx(16, rel=0.3)


def _score_of(outputs, bits=4, **kwargs):
    """(the combined score, its signals) of sites with float outputs [m,D] each."""
    found = [_signals(y, _quantised(y, bits)) for y in outputs]
    names = {"energy": "energy", "pca": "leak", "dimension": "dimension", "growth": "growth"}
    signals = {name: np.array([each[key] for each in found]) for name, key in names.items()}
    return ranking.combined(signals, **kwargs), signals


@QUICK
@given(seeds, st.integers(2, 7), st.floats(1e-3, 1e3))
def test_the_score_by_rank_is_unchanged_by_a_common_scale(seed, sites, scale):
    outputs = [_outputs(seed + i, 4 + i % 3, 2 + i % 4, rows=60) for i in range(sites)]
    score, _ = _score_of(outputs)
    scaled, _ = _score_of([scale * y for y in outputs])
    np.testing.assert_allclose(scaled, score, atol=1e-12)
    assert np.all((score >= 0) & (score <= 1))


def _of_fragile(loudness, seed):
    """Signals of four sites x @ w at 4 bits; in the third one weight sets the step of all."""
    rng = np.random.default_rng(seed)
    x, weights = rng.normal(size=(300, 8)), rng.normal(size=(4, 8, 8))
    x[:, 0] *= loudness
    weights[2, 0, 0] = 60.0
    found = [_signals(x @ w, x @ _quantised(w, 4)) for w in weights]
    return {name: np.array([each[name] for each in found]) for name in found[0]}


@pytest.mark.parametrize("seed", range(5))
def test_a_fragile_site_is_ranked_first_where_its_outlier_reads_little(seed):
    found = _of_fragile(1e-3, seed)
    for name in ("leak", "rotate", "relative_error"):
        assert np.argmax(found[name]) == 2, name


@pytest.mark.parametrize("seed", range(5))
def test_an_outlier_that_makes_a_direction_of_its_own_hides_the_error_from_the_leak(seed):
    # The limit that `pca_leak` documents: the manifold is then that direction alone.
    found = _of_fragile(1.0, seed)
    assert found["dimension"][2] == 1 / 8
    assert np.argmax(found["leak"]) != 2


def test_outputs_that_cannot_be_used():
    own, eye = principal(np.zeros(3), np.eye(3)), np.eye(3)
    with pytest.raises(InputError, match="above 0"):
        manifold.energy(np.zeros(3), np.zeros((3, 3)))
    with pytest.raises(InputError, match="2 features beside 3"):
        manifold.pca_leak(own, np.eye(2))
    with pytest.raises(InputError, match="NaN"):
        manifold.pca_leak(own, np.full((3, 3), np.nan))
    with pytest.raises(InputError, match="transpose"):
        manifold.pca_leak(own, np.triu(np.ones((3, 3))))
    with pytest.raises(InputError, match="1 directions of quantised outputs, expected at least 3"):
        manifold.pca_rotate(own, own._replace(values=own.values[:1], vectors=own.vectors[:, :1]))
    with pytest.raises(InputError, match="unknown manifold"):
        manifold.growth([np.zeros(3)], [eye], [np.zeros(3)], [eye], manifold="layer")
    with pytest.raises(InputError, match="the same"):
        manifold.growth(np.zeros((1, 3)), [eye], np.zeros((2, 3)), [eye, eye])
    with pytest.raises(InputError, match="constant"):
        manifold.growth([np.ones(3)], [0 * eye], [np.ones(3)], [eye])

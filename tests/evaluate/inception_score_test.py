"""Inception score: closed forms, a plain-loop oracle, splits."""

import math

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate import intervals
from mpqdiff.evaluate.inception_score import delete_d_scores, inception_score


def _slow_score(logits):
    rows = []
    for row in logits:
        weights = [math.exp(value) for value in row]
        rows.append([weight / sum(weights) for weight in weights])
    marginal = [sum(row[c] for row in rows) / len(rows) for c in range(len(rows[0]))]
    total = sum(p * math.log(p / q) for row in rows for p, q in zip(row, marginal, strict=True))
    return math.exp(total / len(rows))


def test_equals_the_plain_loops():
    logits = np.random.default_rng(0).normal(0.0, 2.0, (40, 10))
    assert inception_score(logits) == pytest.approx(_slow_score(logits), rel=1e-12)


def test_splits_average_the_parts():
    logits = np.random.default_rng(1).normal(0.0, 2.0, (40, 10))
    expected = np.mean([_slow_score(part) for part in np.split(logits, 4)])
    assert inception_score(logits, splits=4) == pytest.approx(expected, rel=1e-12)
    assert inception_score(logits, splits=4) < inception_score(logits)


def test_bounds_confident_and_balanced_is_the_number_of_classes():
    confident = np.tile(np.eye(10) * 1e4, (3, 1))
    assert inception_score(confident) == pytest.approx(10.0)
    assert inception_score(confident[:1].repeat(5, axis=0)) == pytest.approx(1.0)
    assert inception_score(np.zeros((5, 10))) == pytest.approx(1.0)


def test_large_logits_and_shifts_change_nothing():
    logits = np.random.default_rng(2).normal(size=(20, 10))
    shift = np.random.default_rng(3).uniform(-900, 900, (20, 1))
    assert inception_score(logits + shift) == pytest.approx(inception_score(logits), rel=1e-9)


def test_unusable_input():
    with pytest.raises(InputError, match="splits=6"):
        inception_score(np.zeros((5, 10)), splits=6)
    with pytest.raises(InputError, match="1 of 5 rows"):
        inception_score(np.where(np.arange(50).reshape(5, 10) == 7, np.nan, 0.0))


def test_delete_d_equals_recomputing_from_the_kept_rows():
    logits = np.random.default_rng(4).normal(0.0, 2.0, (5000, 6)).astype(np.float32)
    omitted = intervals.omissions(5000, seed=0, draws=4)
    expected = [inception_score(np.delete(logits, rows, axis=0)) for rows in omitted]
    np.testing.assert_allclose(delete_d_scores(logits, omitted), expected, rtol=1e-10)


def test_the_jackknife_gives_the_scatter_over_fresh_samples():
    rng = np.random.default_rng(5)
    samples = [rng.normal(0.0, 2.0, (200, 10)) for _ in range(150)]
    omitted = intervals.omissions(200, seed=0)
    errors = [
        intervals.jackknife_interval(0.0, delete_d_scores(x, omitted), n=200, d=40).half_width / 2
        for x in samples[:30]
    ]
    assert 0.85 < np.mean(errors) / np.std([inception_score(x) for x in samples]) < 1.3


def test_a_shuffle_changes_the_splits_and_not_the_whole():
    logits = np.random.default_rng(6).normal(0.0, 2.0, (50, 10))
    whole, shuffled = inception_score(logits), inception_score(logits, shuffle_seed=2020)
    assert shuffled == pytest.approx(whole, rel=1e-12)
    split = inception_score(logits, splits=5, shuffle_seed=2020)
    assert split != inception_score(logits, splits=5)
    assert split == inception_score(logits, splits=5, shuffle_seed=2020)

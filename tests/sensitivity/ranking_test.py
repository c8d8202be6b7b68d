"""The combined score and its table of damage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.sensitivity import ranking

seeds = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=40, deadline=None)


@QUICK
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=9), seeds)
def test_ranks_are_between_0_and_1_in_the_order_of_the_values(values, seed):
    x = np.array(values, float)
    rank = ranking.by_rank(x)
    assert np.all((rank >= 0) & (rank <= 1))
    assert rank.mean() == pytest.approx(0.5)
    np.testing.assert_array_equal(rank[:, None] < rank, x[:, None] < x)
    order = np.random.default_rng(seed).permutation(len(x))
    np.testing.assert_array_equal(ranking.by_rank(x[order]), rank[order])
    np.testing.assert_array_equal(ranking.by_rank(np.exp(x)), rank)  # any rising function


def test_normalisations_by_hand():
    np.testing.assert_allclose(ranking.by_rank([5.0, 1.0, 5.0, 8.0]), [0.5, 0, 0.5, 1])
    np.testing.assert_allclose(ranking.by_range([3.0, 1.0, 5.0, 9.0]), [0.25, 0, 0.5, 1])
    for normalise in ranking.NORMALISATIONS.values():
        np.testing.assert_array_equal(normalise([2.0, 2.0]), [0.5, 0.5])
        np.testing.assert_array_equal(normalise([2.0]), [0.5])


def test_the_score_weighs_its_signals_and_keeps_timesteps_apart():
    energy = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    pca = np.array([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]])
    both = {"energy": energy, "pca": pca}
    np.testing.assert_allclose(
        ranking.combined(both, normalisation="min_max"), [[0, 0.25, 1], [0.5, 0.25, 0.5]]
    )
    alone = ranking.combined(both, weights={"energy": 3.0, "pca": 0.0})
    np.testing.assert_allclose(alone, [[0, 0.5, 1], [1, 0.5, 0]])
    np.testing.assert_allclose(ranking.combined({"energy": energy[0]}), [0, 0.5, 1])


def test_the_cost_table_is_the_score_by_the_error():
    table = ranking.cost_table([0.5, 1.0], [[4.0, 1.0], [8.0, 2.0]])
    np.testing.assert_allclose(table, [[2, 0.5], [8, 2]])
    with pytest.raises(InputError, match="negative or not finite"):
        ranking.cost_table([0.5], [[-1.0]])
    with pytest.raises(InputError, match=r"\[L\], \[L,K\]"):
        ranking.cost_table([0.5, 1.0], [[1.0]])


@pytest.mark.parametrize(
    ("signals", "kwargs", "message"),
    [
        ({"energy": [1.0, np.nan]}, {}, "not finite"),
        ({"energy": [1.0], "pca": [1.0, 2.0]}, {}, "all the same"),
        ({"colour": [1.0]}, {}, "unknown manifold signal"),
        ({"energy": [1.0]}, {"normalisation": "z"}, "unknown normalisation"),
        ({"energy": [1.0]}, {"weights": {"pca": 1.0}}, "one per signal"),
        ({"energy": [1.0]}, {"weights": {"energy": 0.0}}, "not all 0"),
        ({"energy": [1.0]}, {"weights": {"energy": -1.0}}, "at least 0"),
        ({}, {}, "one per signal"),
        ({"energy": []}, {}, "all the same"),
    ],
)
def test_signals_that_cannot_be_combined(signals, kwargs, message):
    with pytest.raises(InputError, match=message):
        ranking.combined(signals, **kwargs)

"""The quantile plan within a budget, and the greedy solver that repairs it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.records import Problem
from mpqdiff.sensitivity import ranking
from mpqdiff.solve import feasible, greedy, quantile

seeds = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=40, deadline=None)
BITS = np.array([4, 6, 8])


def _instance(seed, sites):
    """(score [L], cost [L,3] in bytes, legal [L,3]) with ties among scores and some pins."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(1, 1000, size=sites)[:, None] * BITS / 8
    legal = np.ones((sites, 3), bool)
    legal[rng.random(sites) < 0.2, :2] = False
    return rng.integers(0, 2 * sites, size=sites).astype(float), cost, legal


def test_the_distribution_counts_equal_scores_alike():
    np.testing.assert_allclose(quantile.distribution([3.0, 1.0, 3.0, 7.0]), [0.75, 0.25, 0.75, 1])


def test_the_default_quantiles_by_hand():
    level = quantile.levels(np.random.default_rng(0).permutation(20))
    assert np.bincount(level).tolist() == [7, 7, 6]
    ordered = quantile.levels(np.arange(20))
    assert np.all(np.diff(ordered) >= 0)


def test_an_average_of_5_12_bits_is_28_percent_of_the_sites_at_8():
    # 6.25 times smaller than float32 with 4 and 8 bits, sites of one size.
    cost = np.full((100, 1), 1000) * np.array([4, 8]) / 8
    choice, (used,) = quantile.seed(
        np.arange(100), cost, np.ones((100, 2), bool), 100 * 1000 * 4 / 6.25, quantiles=(0.75,)
    )
    assert np.bincount(choice).tolist() == [72, 28]
    assert np.flatnonzero(choice).tolist() == list(range(72, 100))
    np.testing.assert_array_equal(quantile.levels(np.arange(100), quantiles=(used,)), choice)


@QUICK
@given(seeds, st.integers(1, 12), st.floats(0, 1.1))
def test_the_seed_is_the_widest_quantile_plan_within_the_budget(seed, sites, part):
    score, cost, legal = _instance(seed, sites)
    index = np.arange(sites)
    least = cost[index, legal.argmax(axis=1)].sum()
    budget = least + part * (cost[:, -1].sum() - least)
    choice, used = quantile.seed(score, cost, legal, budget)
    assert choice.dtype == np.int32
    assert legal[index, choice].all()
    spent = cost[index, choice].sum()
    assert spent <= budget
    free = legal.all(axis=1)
    for a in index[free]:
        assert all(choice[a] <= choice[b] for b in index[free] if score[a] <= score[b])
    assert used[0] <= used[1]
    # Every other plan of the family, from quantiles of its own, is over budget or no wider.
    for s in np.arange(0, 2, 0.02):
        q = np.clip(1 - s * (1 - np.array([0.40, 0.75])), 0, 1 - 1e-12)
        level = quantile.levels(score, quantiles=tuple(q))
        other = np.where(free, level, 2)
        rival = cost[index, other].sum()
        assert rival > budget or rival <= spent * (1 + 1e-12)


@QUICK
@given(seeds, st.integers(1, 12))
def test_a_budget_for_all_gives_all_and_the_least_gives_none(seed, sites):
    score, cost, legal = _instance(seed, sites)
    choice, _ = quantile.seed(score, cost, legal, cost[:, -1].sum())
    assert np.all(choice == 2)
    least = np.take_along_axis(cost, legal.argmax(axis=1)[:, None], axis=1).sum()
    choice, used = quantile.seed(score, cost, legal, least)
    np.testing.assert_array_equal(choice, legal.argmax(axis=1))
    if legal.all():
        assert used == (np.inf, np.inf)
    with pytest.raises(InputError, match="the narrowest plan costs"):
        quantile.seed(score, cost, legal, least - 1)


@QUICK
@given(seeds, st.integers(2, 10), st.floats(0.05, 0.95))
def test_the_greedy_solver_repairs_the_seed_upwards(seed, sites, part):
    score, cost, legal = _instance(seed, sites)
    index = np.arange(sites)
    least = cost[index, legal.argmax(axis=1)].sum()
    budget = least + part * (cost[:, -1].sum() - least)
    choice, _ = quantile.seed(score, cost, legal, budget)
    error = np.broadcast_to(4.0**-BITS, cost.shape)
    problem = Problem(
        value=ranking.cost_table(ranking.by_rank(score) + 0.1, error),
        resources=cost[None],
        fixed=np.zeros(1),
        budgets=np.array([budget]),
        w_bits=BITS,
        a_bits=np.full(3, 8),
        legal=quantile.at_least(legal, choice),
        tie=index,
        parameters=np.ones(sites, int),
    )
    np.testing.assert_array_equal(feasible.start(feasible.rows(problem)), choice)
    repaired = greedy.solve(problem).choice
    value = np.asarray(problem.value)
    assert np.all(repaired >= choice)
    assert value[index, repaired].sum() <= value[index, choice].sum()
    spent = cost[index, repaired].sum()
    assert spent <= budget * (1 + 1e-9)
    # No single raise is left that the budget allows.
    for site in index[repaired < 2]:
        after = spent - cost[site, repaired[site]] + cost[site, repaired[site] + 1]
        assert after > budget


@pytest.mark.parametrize(
    ("score", "cost", "legal", "quantiles", "message"),
    [
        ([1.0, np.nan], np.ones((2, 3)), np.ones((2, 3), bool), (0.4, 0.75), "finite"),
        ([], np.ones((0, 3)), np.ones((0, 3), bool), (0.4, 0.75), "finite"),
        ([1.0, 2.0], np.ones((2, 2)), np.ones((2, 3), bool), (0.4, 0.75), "one site per score"),
        ([1.0, 2.0], np.ones((2, 3)), np.zeros((2, 3), bool), (0.4, 0.75), "legal choice"),
        ([1.0, 2.0], np.full((2, 3), np.nan), np.ones((2, 3), bool), (0.4, 0.75), "not finite"),
        ([1.0, 2.0], -np.ones((2, 3)), np.ones((2, 3), bool), (0.4, 0.75), "negative"),
        ([1.0, 2.0], np.ones((2, 3)), np.ones((2, 3), bool), (0.75, 0.4), "ascending"),
        ([1.0, 2.0], np.ones((2, 3)), np.ones((2, 3), bool), (0.4, 1.0), "ascending"),
    ],
)
def test_what_gives_no_plan(score, cost, legal, quantiles, message):
    with pytest.raises(InputError, match=message):
        quantile.seed(score, cost, legal, 100.0, quantiles=quantiles)

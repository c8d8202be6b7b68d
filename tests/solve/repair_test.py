"""The repair: by hand, against the exact LP on convex tables, and where its first plan is from."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.solve import greedy, repair, solve
from mpqdiff.solve.feasible import fits, rows

QUICK = settings(max_examples=60, deadline=None)


def convex(seed, sites, choices):
    """(value, cost, some score): what a bit saves per resource falls with every bit."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(sigma=1.0, size=(sites, 1))
    saved = np.sort(rng.lognormal(size=(sites, choices - 1)), axis=1)[:, ::-1] * size
    value = np.cumsum(np.concatenate([saved.sum(axis=1, keepdims=True), -saved], axis=1), axis=1)
    return np.maximum(value, 0), size * np.arange(1, choices + 1), rng.uniform(size=sites)


def budget_of(cost, part):
    return cost[:, 0].sum() + part * (cost[:, -1].sum() - cost[:, 0].sum())


def test_by_hand(make_problem):
    # Savings per byte: site 0 9 then 1, site 1 4 then 3, site 2 2 then 1. Budget for two raises.
    value = [[10.0, 1.0, 0.0], [7.0, 3.0, 0.0], [3.0, 1.0, 0.0]]
    cost = [[1.0, 2.0, 3.0]] * 3
    problem = make_problem(value, cost, 5.0)
    table = rows(problem)
    # The score wants the last two sites; two of three are too many at level 2, so that F = 1 alone
    # reaches it: 1 + 1 + 3.
    first = repair.seed(table, np.array([0.0, 1.0, 2.0]), (0.40, 0.75))
    np.testing.assert_array_equal(first, [0, 0, 2])
    out = repair.solve(problem, score=[0.0, 1.0, 2.0])
    np.testing.assert_array_equal(out.choice, [1, 1, 0])
    assert (out.objective, out.bound) == (7.0, pytest.approx(7.0))


@QUICK
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.98))
def test_on_convex_tables_it_is_the_lp_up_to_its_last_step(make_problem, seed, part):
    value, cost, score = convex(seed, sites=15, choices=4)
    problem = make_problem(value, cost, budget_of(cost, part))
    lp = solve(problem, "lp")
    for out in (solve(problem, "repair"), solve(problem, "repair", score=score)):
        assert fits(rows(problem), out.choice)
        # One step is left open: what it saves is all that can be missed.
        assert out.objective - out.bound <= (value[:, :-1] - value[:, 1:]).max() * (1 + 1e-9)
        np.testing.assert_allclose(out.bound, lp.bound, rtol=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_where_steps_cost_alike_it_is_optimal_from_any_first_plan(make_problem, seed):
    value, _, score = convex(seed, sites=15, choices=4)
    cost = np.ones((15, 1)) * np.arange(4)
    problem = make_problem(value, cost, 17.0)
    exact = solve(problem, "lp", exact=True)
    for given_score in (score, -score, np.zeros(15)):
        out = solve(problem, "repair", score=given_score)
        np.testing.assert_allclose(out.objective, exact.objective)


def test_raising_alone_would_keep_a_bad_first_plan(make_problem):
    value, cost, _ = convex(3, sites=15, choices=3)
    problem = make_problem(value, cost, budget_of(cost, 0.4))
    wrong = -value[:, 0]  # bits for those that save least
    first = repair.seed(rows(problem), wrong, (0.40, 0.75))
    kept = replace(problem, legal=np.asarray(problem.legal) & (np.arange(3) >= first[:, None]))
    assert solve(problem, "repair", score=wrong).objective < 0.9 * greedy.solve(kept).objective


@pytest.mark.parametrize("resources", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_several_budgets_hold_and_are_used(make_problem, resources, seed):
    rng = np.random.default_rng(seed)
    value, size, score = convex(seed, sites=30, choices=4)
    factor = rng.lognormal(sigma=0.5, size=(resources, 30, 1))
    cost = size * factor
    budget = np.array([budget_of(one, 0.5) for one in cost])
    problem = make_problem(value, cost, budget)
    out = solve(problem, "repair", score=score)
    table = rows(problem)
    assert fits(table, out.choice)
    assert out.gap <= 0.1 * value[:, 0].sum()
    for site in range(30):  # no single raise that fits is left
        for k in range(out.choice[site] + 1, 4):
            raised = out.choice.copy()
            raised[site] = k
            assert not fits(table, raised) or value[site, k] >= value[site, out.choice[site]]


def test_pins_and_ties_hold(make_problem):
    value, cost, score = convex(1, sites=8, choices=3)
    legal = np.ones((8, 3), bool)
    legal[2] = [False, False, True]
    problem = make_problem(
        value, cost, budget_of(cost, 0.6), legal=legal, tie=[0, 1, 2, 3, 3, 5, 6, 6]
    )
    out = solve(problem, "repair", score=score)
    assert out.choice[2] == 2
    assert out.choice[3] == out.choice[4] and out.choice[6] == out.choice[7]
    assert fits(rows(problem), out.choice)
    everything = make_problem(value, cost, np.inf, legal=legal)
    np.testing.assert_array_equal(solve(everything, "repair").choice, np.full(8, 2))


def test_what_only_a_pinned_site_can_take_is_no_level(make_problem):
    value, cost, score = convex(3, sites=6, choices=3)
    plain = solve(make_problem(value, cost, budget_of(cost, 0.5)), "repair", score=score)
    # A seventh site, pinned to a fourth choice (float, say) that no other one has.
    wide = np.pad(value, ((0, 1), (0, 1))), np.pad(cost, ((0, 1), (0, 1)), constant_values=1.0)
    legal = np.zeros((7, 4), bool)
    legal[:6, :3], legal[6, 3] = True, True
    problem = make_problem(*wide, budget_of(cost, 0.5) + 1.0, legal=legal)
    more = solve(problem, "repair", score=[*score, 0.0])
    assert more.choice.tolist() == [*plain.choice, 3]
    table = repair.rows(problem)
    assert repair.levels(table).tolist() == [0, 1, 2]
    first = repair.seed(table, np.array([*score, 0.0]), (0.40, 0.75))
    assert first[6] == 3 and first[:6].max() <= 2


def test_a_group_of_tied_sites_has_its_largest_score(make_problem):
    value, cost = np.ones((4, 1)) * [2.0, 0.0], np.ones((4, 1)) * [1.0, 2.0]
    problem = make_problem(value, cost, 8.0, tie=[0, 1, 0, 3])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair, "choose", lambda p, score, q: seen.append(score) or np.zeros(3, int))
        solve(problem, "repair", score=[1.0, 2.0, 5.0, 3.0])
    np.testing.assert_array_equal(seen[0], [5, 2, 3])


def test_the_default_quantiles_are_those_of_three_levels_and_of_two():
    np.testing.assert_allclose(repair.default_quantiles(3), (0.40, 0.75))
    np.testing.assert_allclose(repair.default_quantiles(2), (0.75,))
    assert repair.default_quantiles(1) == ()


def test_the_hull_leaves_out_what_no_price_chooses():
    resource = np.array([[1.0, 2.0, 3.0, 4.0, 4.0]])
    value = np.array([[9.0, 8.0, 2.0, 1.0, 3.0]])
    legal = np.ones((1, 5), bool)
    assert repair.hull(resource, value, legal) == [[0, 2, 3]]
    legal[0, 2] = False
    assert repair.hull(resource, value, legal) == [[0, 3]]


def test_arguments_that_do_not_fit(make_problem):
    value, cost, score = convex(0, sites=4, choices=3)
    problem = make_problem(value, cost, budget_of(cost, 0.5))
    with pytest.raises(InputError, match=r"score has shape \(3,\), expected \[4\]"):
        solve(problem, "repair", score=score[:3])
    with pytest.raises(InputError, match="expected finite ones"):
        solve(problem, "repair", score=np.full(4, np.nan))
    with pytest.raises(InputError, match="one choice more than quantiles"):
        solve(problem, "repair", quantiles=(0.5,))
    with pytest.raises(InputError, match="ascending ones"):
        solve(problem, "repair", quantiles=(0.8, 0.5))

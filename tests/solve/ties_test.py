"""Tied sites: one choice for all of them, from every solver, with one budget and with two."""

from dataclasses import replace

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.solve import SOLVERS, budget_range, solve, solve_many, ties


def tied(make_problem, budget=40.0):
    """Six sites in four groups, whose members lie apart; site 1 is pinned, and so its group."""
    rng = np.random.default_rng(0)
    value = np.sort(rng.uniform(size=(6, 3)), axis=1)[:, ::-1]
    cost = np.arange(1, 7)[:, None] * np.array([1.0, 2.0, 4.0])
    legal = np.ones((6, 3), bool)
    legal[1] = [False, True, False]
    return make_problem(value, cost, budget, legal=legal, tie=[7, 3, 7, 5, 1, 3])


@pytest.mark.parametrize("name", SOLVERS)
def test_tied_sites_agree_and_pins_hold(run, make_problem, name):
    problem = tied(make_problem)
    out = run(problem, name)
    assert out.choice.shape == (6,)
    assert out.choice[0] == out.choice[2]
    assert out.choice[1] == out.choice[5] == 1
    sites = np.arange(6)
    assert problem.resources[0, sites, out.choice].sum() <= 40
    np.testing.assert_allclose(out.objective, problem.value[sites, out.choice].sum())


def test_ties_collapse_in_depth_order(make_problem):
    problem = tied(make_problem)
    small, group = ties.collapse(problem)
    np.testing.assert_array_equal(group, [0, 1, 0, 2, 3, 1])
    np.testing.assert_allclose(small.value[0], problem.value[0] + problem.value[2])
    np.testing.assert_allclose(small.resources[0, 1], [2 + 6, 4 + 12, 8 + 24])
    np.testing.assert_array_equal(small.legal[1], [False, True, False])
    np.testing.assert_array_equal(small.parameters, [2, 2, 1, 1])


def test_ties_with_nothing_in_common_are_refused(make_problem):
    problem = tied(make_problem)
    legal = problem.legal.copy()
    legal[5] = [True, False, False]
    with pytest.raises(InputError, match=r"tied sites \[1, 5\]"):
        solve(replace(problem, legal=legal))


def test_budget_range_counts_ties_pins_and_what_is_fixed(make_problem):
    problem = replace(tied(make_problem), fixed=np.array([100.0]))
    pinned = 2 * (2 + 6)
    np.testing.assert_array_equal(
        budget_range(problem), [[100 + pinned + 13], [100 + pinned + 4 * 13]]
    )


def test_many_budgets_are_solved_as_one_by_one(make_problem):
    problem = tied(make_problem)
    budgets = np.linspace(*budget_range(problem), 7)[:, 0]
    for budget, one in zip(budgets, solve_many(problem, budgets), strict=True):
        alone = solve(replace(problem, budgets=np.array([budget])))
        np.testing.assert_array_equal(one.choice, alone.choice)
        np.testing.assert_allclose(one.fractional, alone.fractional)


@pytest.mark.parametrize("name", SOLVERS)
def test_ties_and_pins_hold_under_two_budgets(run, make_problem, name):
    one = tied(make_problem)
    second = one.resources[0][:, ::-1] + 1.0  # the widest is the cheapest here
    problem = replace(
        one, resources=np.stack([one.resources[0], second]), budgets=np.array([55.0, 65.0])
    )
    problem = replace(problem, fixed=np.array([3.0, 5.0]))
    out = run(problem, name)
    assert out.status.feasible
    assert out.choice[0] == out.choice[2]
    assert out.choice[1] == out.choice[5] == 1
    sites = np.arange(6)
    assert (problem.resources[:, sites, out.choice].sum(axis=1) + [3, 5] <= [55, 65]).all()
    np.testing.assert_allclose(out.objective, problem.value[sites, out.choice].sum())


def test_fitness_and_seeds_know_sites_and_not_groups(run, make_problem):
    problem, asked = tied(make_problem, budget=45), []

    def fitness(choices):
        asked.append(choices)
        return choices.sum(axis=1)

    seed = np.array([0, 1, 0, 2, 0, 1])
    out = run(problem, "evolution", fitness=fitness, seeds=seed)
    np.testing.assert_array_equal(asked[0][1], seed)
    rows = np.concatenate(asked)
    assert rows.shape[1] == 6
    assert (rows[:, 0] == rows[:, 2]).all() and (rows[:, 1] == 1).all()
    np.testing.assert_array_equal(out.choice, [0, 1, 0, 0, 0, 1])
    with pytest.raises(InputError, match="tied sites different"):
        run(problem, "evolution", seeds=[0, 1, 1, 0, 0, 1])
    with pytest.raises(InputError, match=r"expected \[P,6\]"):
        run(problem, "evolution", seeds=[0, 1, 1, 0])

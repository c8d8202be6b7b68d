"""What all solvers share: the registry, tied sites, pins and the refusal of unusable problems."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.solve import SOLVERS, budget_range, solve, solve_many, ties


def run(problem, name):
    return solve(problem, name, **({"key": jax.random.key(0)} if name == "random" else {}))


def tied(make_problem, budget=40.0):
    """Six sites in four groups, whose members lie apart; site 1 is pinned, and so its group."""
    rng = np.random.default_rng(0)
    value = np.sort(rng.uniform(size=(6, 3)), axis=1)[:, ::-1]
    cost = np.arange(1, 7)[:, None] * np.array([1.0, 2.0, 4.0])
    legal = np.ones((6, 3), bool)
    legal[1] = [False, True, False]
    return make_problem(value, cost, budget, legal=legal, tie=[7, 3, 7, 5, 1, 3])


@pytest.mark.parametrize("name", SOLVERS)
def test_tied_sites_agree_and_pins_hold(make_problem, name):
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
    assert budget_range(problem) == (100 + pinned + 13, 100 + pinned + 4 * 13)


@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_cost_counts_against_the_budget(linear_problem, name):
    problem = linear_problem([1.0, 2.0], [10, 10], 120, fixed=20)
    assert np.arange(2, 9)[run(problem, name).choice].sum() == 10
    with pytest.raises(InputError, match="below the minimum 60"):
        run(replace(problem, budgets=np.array([59.0])), name)


def test_unknown_solver_lists_the_known_ones(linear_problem):
    with pytest.raises(InputError, match="known: greedy, lp, random, size_only, uniform"):
        solve(linear_problem([1.0], [1], 8), "simplex")


def spoiled(problem, field, index, value):
    array = np.array(getattr(problem, field))
    array[index] = value
    return replace(problem, **{field: array})


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("value", (1, 2), np.nan, r"value is nan at \[site, choice\] \[1, 2\]"),
        ("resources", (0, 1, 2), np.inf, r"resources is inf at"),
        ("resources", (0, 0, 0), -1.0, "negative costs"),
        ("legal", (1, slice(None)), False, r"no legal choice at sites \[1\]"),
        ("budgets", (0,), np.nan, "budget is NaN"),
        ("fixed", (0,), np.nan, "fixed is NaN"),
        ("w_bits", (0,), 9, "ascending"),
    ],
)
def test_unusable_problems_are_refused(linear_problem, field, index, value, message):
    problem = linear_problem([1.0, 2.0], [10, 10], 100)
    with pytest.raises(InputError, match=message):
        solve(spoiled(problem, field, index, value))


def test_shapes_and_rows_are_checked(linear_problem):
    problem = linear_problem([1.0, 2.0], [10, 10], 100)
    with pytest.raises(InputError, match=r"tie has shape \(3,\), expected \(2,\)"):
        solve(replace(problem, tie=np.arange(3)))
    two = replace(
        problem,
        resources=np.repeat(problem.resources, 2, 0),
        budgets=np.ones(2),
        fixed=np.ones(2),
    )
    with pytest.raises(InputError, match="2 budgets, expected one"):
        solve(two)


def test_what_is_not_legal_may_hold_anything(linear_problem):
    legal = np.ones((2, 7), bool)
    legal[0, 3] = False
    problem = linear_problem([1.0, 2.0], [10, 10], 100, legal=legal)
    odd = spoiled(spoiled(problem, "value", (0, 3), np.nan), "resources", (0, 0, 3), np.nan)
    for name in SOLVERS:
        np.testing.assert_array_equal(run(odd, name).choice, run(problem, name).choice)


def test_many_budgets_are_solved_as_one_by_one(make_problem):
    problem = tied(make_problem)
    budgets = np.linspace(*budget_range(problem), 7)
    for budget, one in zip(budgets, solve_many(problem, budgets), strict=True):
        alone = solve(replace(problem, budgets=np.array([budget])))
        np.testing.assert_array_equal(one.choice, alone.choice)
        np.testing.assert_allclose(one.fractional, alone.fractional)

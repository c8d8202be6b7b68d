"""Branch and bound against brute force and `scipy.optimize.milp`, and where it stops."""

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from mpqdiff.records import Status
from mpqdiff.solve import interior, lp
from mpqdiff.solve.feasible import fits, rows, spent

STYLES = ("real", "integer", "ordered")


def instance(build, seed: int, style: str, sites: int, choices: int, resources: int):
    """Up to 8 sites, with holes; some have no allocation, some budgets are without end."""
    rng = np.random.default_rng(seed)
    shape = (sites, choices)
    value, cost = rng.random(shape), rng.random((resources, *shape))
    if style == "integer":
        value, cost = (np.floor(4 * array) for array in (value, cost))
    elif style == "ordered":
        value, cost = np.sort(value)[:, ::-1], np.sort(cost)
    legal = rng.random(shape) < 0.8
    legal[np.arange(sites), rng.integers(0, choices, sites)] = True
    low = np.where(legal, cost, np.inf).min(axis=2).sum(axis=1)
    high = np.where(legal, cost, -np.inf).max(axis=2).sum(axis=1)
    budgets = low + rng.uniform(0, 1.05, resources) * (high - low)
    budgets[0] -= (seed % 5 == 0) * 0.1 * low[0] + (seed % 5 == 1) * 0.5 * (budgets - low)[0]
    budgets = np.floor(budgets) if style == "integer" else budgets
    if rng.random() < 0.2:
        budgets[-1] = np.inf
    return build(value, cost, budgets, legal=legal)


def brute_force(problem) -> tuple[float, np.ndarray]:
    """(least value within the budgets, least spent of each resource within the others) of all."""
    table = rows(problem)
    each = (np.flatnonzero(ok) for ok in table.legal)
    all_choices = np.array(list(itertools.product(*each)))
    sites = np.arange(len(table.value))
    value = table.value[sites, all_choices].sum(axis=1)
    used = table.cost[:, sites, all_choices].sum(axis=2)
    within = used <= table.limit[:, None]
    best = np.where(within.all(axis=0), value, np.inf).min()
    least = [
        np.where(np.delete(within, r, axis=0).all(axis=0), used[r], np.inf).min()
        for r in range(len(used))
    ]
    return best, np.array(least)


@pytest.mark.parametrize("style", STYLES)
def test_exact_equals_brute_force(make_problem, style):
    infeasible = 0
    for seed in range(14):
        sites = 1 + (3 * seed) % 7
        problem = instance(make_problem, seed, style, sites, 4, 3)
        best, least = brute_force(problem)
        found = interior.solve(problem, exact=True)
        quick = interior.solve(problem)
        if np.isinf(best):
            infeasible += 1
            assert found.status is Status.INFEASIBLE
            assert not quick.status.feasible
            np.testing.assert_allclose(found.nearest, least, rtol=1e-9)
            continue
        assert found.status is Status.OPTIMAL
        assert found.objective == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert found.objective == pytest.approx(spent(problem.value, found.choice))
        assert fits(rows(problem), found.choice)
        assert problem.legal[np.arange(sites), found.choice].all()
        assert found.bound <= best + 1e-12
        assert quick.bound <= best + 1e-9 * abs(best)
    assert 0 < infeasible < 14


def layers(build, seed: int):
    """40 sites of 4 choices under two budgets, and a third without end."""
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 6])
    size = np.ceil(np.exp(rng.normal(8, 1, 40)))[:, None]
    value = np.exp(rng.normal(0, 1, (40, 1))) * 4.0**-bits
    cost = size * bits * np.exp(rng.normal(0, 0.5, (3, 40, 4)))
    cost[0] = size * bits
    low, high = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    budgets = low + rng.uniform(0.2, 0.6, 3) * (high - low)
    budgets[2] = np.inf
    return build(value, cost, budgets, bits=bits)


def test_exact_equals_milp_where_rounding_does_not(make_problem):
    improved = 0
    for seed in range(5):
        problem = layers(make_problem, seed)
        quick, found = interior.solve(problem), interior.solve(problem, exact=True)
        scale = problem.value.max()
        out = milp(
            problem.value.ravel() / scale,
            constraints=[
                LinearConstraint(np.kron(np.eye(40), np.ones(4)), 1, 1),
                LinearConstraint(
                    (problem.resources / problem.budgets[:, None, None]).reshape(3, -1), -np.inf, 1
                ),
            ],
            integrality=np.ones(160),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-9},
        )
        assert found.status is Status.OPTIMAL
        assert found.objective == pytest.approx(scale * out.fun, rel=1e-8)
        assert quick.bound <= found.bound <= found.objective <= quick.objective
        improved += found.objective < quick.objective * (1 - 1e-9)
    assert improved


def test_node_limit_tells_the_gap_that_is_left(make_problem):
    left = []
    for seed in range(5):
        problem = layers(make_problem, seed)
        best = interior.solve(problem, exact=True).objective
        found = interior.solve(problem, exact=True, node_limit=2)
        assert found.bound <= best <= found.objective
        assert found.gap == pytest.approx(found.objective - found.bound)
        assert fits(rows(problem), found.choice)
        assert found.status in (Status.NODE_LIMIT, Status.OPTIMAL)
        left.append(found.status is Status.NODE_LIMIT)
    assert any(left)


def test_budgets_that_fit_shares_but_no_choice_are_decided_by_the_search(make_problem):
    cost = np.zeros((3, 2, 4))
    cost[:, 0] = [[3, 0, 0, 3], [0, 3, 0, 0], [0, 0, 3, 0]]
    problem = make_problem(np.ones((2, 4)), cost, [2, 2, 2])
    quick = interior.solve(problem)
    assert quick.status is Status.UNDECIDED
    assert quick.bound <= 2
    found = interior.solve(problem, exact=True)
    assert found.status is Status.INFEASIBLE
    np.testing.assert_array_equal(found.nearest, [3, 3, 3])


def test_one_budget_agrees_with_the_sort(make_problem):
    for seed in range(8):
        problem = instance(make_problem, seed, STYLES[seed % 3], 8, 4, 1)
        by_sort, by_path = lp.solve(problem), interior.solve(problem)
        assert by_path.status.feasible == by_sort.status.feasible
        if not by_sort.status.feasible:
            assert by_path.nearest == pytest.approx(by_sort.nearest)
            continue
        assert by_path.bound == pytest.approx(by_sort.bound, rel=1e-9, abs=1e-12)
        found = interior.solve(problem, exact=True)
        assert found.objective == pytest.approx(brute_force(problem)[0], rel=1e-9, abs=1e-12)

"""The threshold: golden by hand, the smallest there is, and where what is left goes."""

import numpy as np
import pytest

from mpqdiff.solve.feasible import fits, rows, scarcity
from mpqdiff.solve.threshold import at_threshold, ladder, lowest, spend

DAMAGE = [[9.0, 4.0, 1.0], [6.0, 3.0, 2.0], [8.0, 5.0, 0.0]]
COST = [[1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [1.0, 2.0, 4.0]]


def test_golden_by_hand(make_problem, run):
    # At 4: sites 0 and 1 take 4 and 3, site 2 must take 0: 2 + 4 + 4 = 10. At 3, and so 4 more
    # for site 0: 4 + 4 + 4 = 12. At 5: 2 + 4 + 2 = 8. At 6: 2 + 2 + 2 = 6. At 8: 2 + 2 + 1.
    def at(budget):
        problem = make_problem(DAMAGE, COST, budget)
        return lowest(rows(problem)), run(problem, "threshold").choice.tolist()

    assert at(16) == (-np.inf, [2, 2, 2])
    assert at(15) == (3.0, [2, 1, 2])  # 12; what would be next, site 1, takes 4
    assert at(11) == (4.0, [1, 1, 2])
    assert at(9) == (5.0, [1, 1, 1])
    assert at(8) == (5.0, [1, 1, 1])
    assert at(7) == (6.0, [1, 0, 1])
    assert at(5) == (8.0, [1, 0, 0])
    assert at(4) == (9.0, [0, 0, 0])


def test_what_is_left_goes_to_the_most_damaged(make_problem):
    # Left at 6: 3 units. Site 1 is worst but a step of it takes 2, then site 0 nothing fits.
    table = rows(make_problem(DAMAGE, COST, 9))
    np.testing.assert_array_equal(at_threshold(ladder(table), 6.0), [1, 0, 1])
    np.testing.assert_array_equal(spend(table, np.array([1, 0, 1])), [1, 1, 1])
    np.testing.assert_array_equal(spend(table, np.array([0, 0, 0])), [1, 1, 1])


def test_a_wider_choice_of_equal_cost_is_taken_and_a_worse_one_never(make_problem):
    table = rows(make_problem([[5.0, 3.0, 1.0, 2.0]], [[1.0, 2.0, 2.0, 3.0]], 3.0))
    np.testing.assert_array_equal(at_threshold(ladder(table), 3.0), [2])
    np.testing.assert_array_equal(at_threshold(ladder(table), 0.0), [2])
    np.testing.assert_array_equal(spend(table, np.array([0])), [2])


def slowly(table):
    """`at_threshold` and `lowest` by definition, over all thresholds from below."""
    price = scarcity(table.cost, table.legal, table.limit)
    damage = np.where(table.legal, table.value, np.inf)
    floor = damage.min(axis=1, keepdims=True)
    for threshold in [-np.inf, *np.unique(damage[np.isfinite(damage)])]:
        allowed = damage <= np.maximum(threshold, floor)
        choice = np.where(allowed, price, np.inf).argmin(axis=1)
        yield threshold, choice, fits(table, choice)


@pytest.mark.parametrize("resources", [1, 3])
def test_no_smaller_threshold_fits(make_problem, resources):
    rng = np.random.default_rng(resources)
    gaps = 0
    for _ in range(60):
        cost, value = rng.uniform(size=(resources, 6, 4)), rng.uniform(size=(6, 4))
        legal = rng.uniform(size=(6, 4)) < 0.8
        legal[:, 0] = True
        budget = rng.uniform(0.3, 0.6, resources) * 6
        table = rows(make_problem(value, cost, budget, legal=legal))
        found, expected = lowest(table), list(slowly(table))
        enough = [fit for _, _, fit in expected]
        assert found == next((t for t, _, fit in expected if fit), None)
        for threshold, choice, _ in expected:
            np.testing.assert_array_equal(at_threshold(ladder(table), threshold), choice)
        gaps += bool(np.any(np.diff(np.asarray(enough, int)) < 0))
    # A higher threshold may not fit where a lower does: only with several budgets.
    assert (gaps > 0) == (resources > 1)


def test_nothing_is_left_that_would_lower_the_damage(make_problem, run):
    rng = np.random.default_rng(5)
    for _ in range(10):
        value, cost = rng.uniform(size=(8, 4)), rng.uniform(size=(8, 4))
        problem = make_problem(value, cost, cost.min(axis=1).sum() + rng.uniform(0, 2))
        out = run(problem, "threshold")
        sites = np.arange(8)
        rest = problem.budgets[0] - cost[sites, out.choice].sum()
        step = cost - cost[sites, out.choice][:, None]
        lower = value < value[sites, out.choice][:, None]
        assert not (lower & (step <= rest)).any()

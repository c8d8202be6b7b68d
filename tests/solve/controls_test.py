"""Greedy, uniform and random: within budget, close to it, blind where they must be."""

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linprog

from mpqdiff.solve import SOLVERS, budget_range, greedy, uniform
from mpqdiff.solve.uniform import at_width

WIDTHS = {"two": (4, 8), "three": (2, 4, 8), "all": (2, 3, 4, 5, 6, 7, 8)}
PACKED = {2: 0.25, 3: 0.5, 4: 0.5, 5: 1, 6: 1, 7: 1, 8: 1}


def layers(rng, bits, make_problem, packed):
    """A network like ours: sizes over two orders, first and last site pinned at 8 bit."""
    n = rng.integers(16, 4000, 14) * 8
    per_weight = [PACKED[b] if packed else b / 8 for b in bits]
    damage = rng.uniform(0.1, 1, (14, 1)) * n[:, None] * 4.0 ** -np.array(bits)
    legal = np.ones((14, len(bits)), bool)
    legal[[0, -1], :-1] = False
    cost = n[:, None] * np.array(per_weight) + 4 * np.sqrt(n)[:, None]

    def at(budget):
        return make_problem(
            damage, cost, budget, bits=bits, legal=legal, parameters=n, fixed=1000.0
        )

    return at, cost, legal


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bits", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("packed", [True, False], ids=["device", "file"])
def test_never_above_the_budget_and_less_than_one_step_below(run, make_problem, name, bits, packed):
    rng = np.random.default_rng(len(bits))
    at, cost, legal = layers(rng, bits, make_problem, packed)
    (least,), (most,) = budget_range(at(0))
    steps = np.diff(cost, axis=1)[1:-1].max()  # of the largest site without a pin
    for budget in (least, *np.linspace(least, most, 12), most):
        out = run(at(budget), name)
        used = 1000.0 + cost[np.arange(14), out.choice].sum()
        assert used <= budget * (1 + 1e-12)
        if name not in ("lp", "greedy", "evolution"):
            assert budget - used < steps or np.isclose(used, most)
        assert legal[np.arange(14), out.choice].all()
        assert out.bound <= out.objective
    if name != "evolution":
        assert (np.asarray(bits)[out.choice] == 8).all()


def test_greedy_reaches_what_the_lp_rounds_to_or_better(run, make_problem):
    rng = np.random.default_rng(7)
    better = 0
    for _ in range(10):
        value = np.sort(rng.uniform(size=(8, 4)))[:, ::-1]
        cost = np.cumsum(rng.uniform(0.1, 1, (8, 4)), axis=1)
        (least,), (most,) = budget_range(make_problem(value, cost, 0))
        problem = make_problem(value, cost, (least + most) / 2)
        greedy, rounded = run(problem, "greedy"), run(problem, "lp")
        np.testing.assert_allclose(greedy.bound, rounded.bound)
        better += greedy.objective <= rounded.objective + 1e-12
    assert better >= 8


def test_greedy_walks_the_hull(run, linear_problem):
    theta, n = [0.50780989, 0.44340873, 0.85416999], [100, 400, 50]
    problem = linear_problem(theta, n, 2200)
    np.testing.assert_array_equal(run(problem, "greedy").choice, run(problem, "lp").choice)


def test_greedy_fills_between_hull_choices(run, make_problem):
    # Off the hull, but all that fits what is left: the LP's rounding leaves it.
    problem = make_problem([[1.0, 0.9, 0.0]], [[1.0, 1.9, 2.0]], 1.95)
    assert run(problem, "lp").choice[0] == 0
    assert run(problem, "greedy").choice[0] == 1


def test_uniform_is_one_width_then_raises_in_depth_order(run, linear_problem):
    n = [100, 100, 100, 100]
    np.testing.assert_array_equal(run(linear_problem(np.ones(4), n, 2000), "uniform").choice, 3)
    between = run(linear_problem(np.ones(4), n, 2250), "uniform")
    np.testing.assert_array_equal(between.choice, [4, 4, 3, 3])
    skips = run(linear_problem(np.ones(3), [100, 300, 100], 2500 + 250), "uniform")
    np.testing.assert_array_equal(skips.choice, [4, 3, 4])


def test_uniform_keeps_pins(run, linear_problem):
    legal = np.ones((3, 7), bool)
    legal[0, :6] = False
    out = run(linear_problem(np.ones(3), [100, 100, 100], 1600, legal=legal), "uniform")
    np.testing.assert_array_equal(out.choice, [6, 2, 2])
    np.testing.assert_array_equal(at_width(np.array([[True, False, True]]), 1), [0])
    np.testing.assert_array_equal(at_width(np.array([[False, False, True]]), 1), [2])


def test_uniform_takes_the_widest_of_equal_cost(run, make_problem):
    bits = WIDTHS["all"]
    cost = 100 * np.array([[PACKED[b] for b in bits]] * 2)
    value = np.ones((2, 7)) * np.arange(7)[::-1]
    out = run(make_problem(value, cost, 150, bits=bits), "uniform")
    np.testing.assert_array_equal(np.asarray(bits)[out.choice], [8, 4])


@pytest.mark.parametrize("name", ["uniform", "random", "size_only"])
def test_controls_do_not_look_at_the_value(run, make_problem, name):
    rng = np.random.default_rng(1)
    cost = np.cumsum(rng.uniform(0.1, 1, (8, 4)), axis=1)
    problems = [
        make_problem(rng.uniform(size=(8, 4)), cost, cost.mean() * 8, parameters=np.arange(1, 9))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*(run(problem, name).choice for problem in problems))


def test_random_depends_on_its_key_alone(run, linear_problem):
    problem = linear_problem(np.ones(12), np.full(12, 10), 12 * 10 * 5, bits=(4, 8))
    first, again, other = (run(problem, "random", seed).choice for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    raised = np.mean([run(problem, "random", seed).choice for seed in range(40)], axis=0)
    assert raised.min() > 0.02
    assert raised.max() < 0.6


def test_greedy_weighs_by_what_is_left_of_the_scarcest_budget(make_problem):
    # Of (10, 10), site 0 takes .6 to save 12 and is first: 20 per share. Of the (4, 10) left,
    # site 1 takes .5 to save 3, and site 2 .75 to save 7: 6 and 9.3 per share. Both do not fit.
    # (Of the whole budgets: .2 and .6, 15 and 11.7 per share.)
    cost = np.zeros((2, 3, 2))
    cost[:, :, 1] = [[6, 2, 3], [0, 0, 6]]
    problem = make_problem([[12.0, 0.0], [3.0, 0.0], [7.0, 0.0]], cost, 10.0)
    np.testing.assert_array_equal(greedy.choose(problem), [1, 0, 1])


def test_greedy_weighs_by_the_largest_share_and_not_their_sum(make_problem):
    # Largest: 12 / .6 against 9 / .5. Summed: 12 / 1.2 against 9 / .5. Both do not fit.
    cost = np.zeros((2, 3, 2))
    cost[:, :, 1] = [[6, 5, 0], [6, 0, 6]]
    problem = make_problem([[12.0, 0.0], [9.0, 0.0], [1.0, 0.0]], cost, 10.0)
    np.testing.assert_array_equal(greedy.choose(problem), [1, 0, 0])


def test_greedy_takes_what_costs_nothing_first(make_problem):
    cost = [[[1.0, 1.0, 5.0]] * 2, [[3.0, 1.0, 0.5]] * 2]
    problem = make_problem([[2.0, 1.0, 0.0], [3.0, 1.0, 0.9]], cost, [6.0, 9.0])
    np.testing.assert_array_equal(greedy.choose(problem), [2, 1])


@pytest.mark.parametrize("resources", [2, 4])
def test_greedy_is_near_the_bound(make_problem, resources):
    rng = np.random.default_rng(resources)
    n = rng.integers(10, 1000, (200, 1))
    value = n * rng.uniform(0.1, 1, (200, 1)) * 4.0 ** -np.arange(2, 9)
    rates = rng.uniform(0.5, 2, (resources, 200, 1))
    cost = n * rates * np.arange(2, 9)
    budgets = 4.0 * (n * rates).sum(axis=(1, 2))
    choice = greedy.choose(make_problem(value, cost, budgets))
    one_each = sparse.kron(sparse.eye(200), np.ones((1, 7)))
    best = linprog(value.ravel(), cost.reshape(resources, -1), budgets, one_each, np.ones(200))
    assert value[np.arange(200), choice].sum() <= 1.05 * best.fun


def test_uniform_is_one_pair_for_all_under_the_scarcer_budget(make_problem):
    n = np.array([10.0, 20.0, 30.0])[:, None]
    w, a = np.array([4, 4, 8, 8, 32]), np.array([4, 8, 4, 8, 32])
    problem = make_problem(
        np.zeros((3, 5)), [n * w, n * w * a], [60 * 8, 60 * 32], bits=w, a_bits=a
    )
    np.testing.assert_array_equal(uniform.choose(problem), 2)
    np.testing.assert_array_equal(at_width(problem.legal, 1), 1)

"""What all solvers share: the registry, several budgets, and the refusal of unusable problems."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.records import Status
from mpqdiff.solve import SOLVERS, advice, arguments, feasible, solve
from mpqdiff.solve.certify import begin, certify


@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_cost_counts_against_the_budget(run, linear_problem, name):
    problem = linear_problem([1.0, 2.0], [10, 10], 120, fixed=20)
    assert np.arange(2, 9)[run(problem, name).choice].sum() == 10
    below = run(replace(problem, budgets=np.array([59.0])), name)
    assert below.status is Status.INFEASIBLE
    np.testing.assert_array_equal(below.nearest, [60])
    assert run(replace(problem, budgets=below.nearest), name).status.feasible


def test_unknown_solver_lists_the_known_ones(linear_problem):
    with pytest.raises(InputError, match="known: evolution, greedy, lp, random, repair, size_only"):
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
        ("budgets", (0,), np.nan, "budgets are"),
        ("fixed", (0,), np.nan, r"fixed is \[nan\]"),
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
    with pytest.raises(InputError, match=r"budgets has shape \(2,\), expected \(1,\)"):
        solve(replace(problem, budgets=np.ones(2)))
    with pytest.raises(InputError, match="1 resources named"):
        solve(replace(problem, names=("bytes", "seconds")))
    none = replace(problem, resources=np.ones((0, 2, 7)), budgets=np.ones(0), fixed=np.ones(0))
    with pytest.raises(InputError, match="no budget"):
        solve(none)


def test_what_is_not_legal_may_hold_anything(run, linear_problem):
    legal = np.ones((2, 7), bool)
    legal[0, 3] = False
    problem = linear_problem([1.0, 2.0], [10, 10], 100, legal=legal)
    odd = spoiled(spoiled(problem, "value", (0, 3), np.nan), "resources", (0, 0, 3), np.nan)
    for name in SOLVERS:
        np.testing.assert_array_equal(run(odd, name).choice, run(problem, name).choice)


def test_arguments_are_told_and_checked(linear_problem):
    assert arguments("random") == {"key": True}
    assert arguments("lp") == {"exact": False, "node_limit": False}
    assert {"key": True, "fitness": False, "schedule": False}.items() <= arguments(
        "evolution"
    ).items()
    problem = linear_problem([1.0, 2.0], [10, 10], 100)
    with pytest.raises(InputError, match=r"'random' got arguments \[\], expected {'key': True}"):
        solve(problem, "random")
    with pytest.raises(InputError, match=r"'uniform' got arguments \['exact'\]"):
        solve(problem, "uniform", exact=True)


def spent(problem, choice):
    return problem.resources[:, np.arange(len(choice)), choice].sum(axis=1) + problem.fixed


@st.composite
def instances(draw):
    """Small problems of two budgets that some allocation fits, without any order in the costs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sites, choices = 5, 4
    shape = (2, sites, choices)
    whole = draw(st.booleans())
    cost = rng.integers(0, 6, shape).astype(float) if whole else rng.uniform(size=shape)
    if draw(st.booleans()):  # "float" is fast and large
        cost = np.sort(cost, axis=2)
        cost[1, :, -1] = cost[1, :, 0] / 2
    value = rng.integers(0, 5, shape[1:]).astype(float) if whole else rng.uniform(size=shape[1:])
    legal = rng.uniform(size=shape[1:]) < draw(st.sampled_from([0.6, 1.0]))
    legal[np.arange(sites), rng.integers(0, choices, sites)] = True
    some = np.array([rng.choice(np.flatnonzero(ok)) for ok in legal])
    fixed = rng.uniform(size=2)
    slack = draw(st.sampled_from([1.0, 1.05, 1.5, np.inf]))
    budget = (cost[:, np.arange(sites), some].sum(axis=1) + fixed) * [1, slack]
    return value, cost, budget, legal, fixed


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=40, deadline=None)
@given(instance=instances())
def test_never_above_any_of_two_budgets(run, make_problem, name, instance):
    value, cost, budget, legal, fixed = instance
    problem = make_problem(value, cost, budget, legal=legal, fixed=fixed)
    out = run(problem, name)
    sites = np.arange(len(value))
    assert legal[sites, out.choice].all()
    if out.status.feasible:
        assert (spent(problem, out.choice) <= budget * (1 + 2e-12)).all()
        np.testing.assert_allclose(out.objective, value[sites, out.choice].sum())
        assert out.bound <= out.objective
        assert out.price.shape == (2,)
    else:
        assert out.status is Status.UNDECIDED


def network(make_problem, budget, names=("bytes", "seconds")):
    """Four sites, 4, 8 and "float": each wider is larger, and float is the fastest."""
    size = np.array([4.0, 3.0, 2.0, 1.0])[:, None]
    cost = np.stack([size * [1, 2, 8], size * [3, 2.5, 1]])
    value = np.array([4.0, 5.0, 6.0, 7.0])[:, None] * [1, 0.25, 0]
    return make_problem(
        value, cost, budget, bits=[4, 8, 32], a_bits=[8, 8, 32], names=names, parameters=size[:, 0]
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_float_where_the_integers_are_too_slow(run, make_problem, name):
    # All at 4 bit takes 30 seconds, all in float 80 bytes.
    problem = network(make_problem, [50.0, 20.0])
    out = run(problem, name)
    assert out.status.feasible
    assert (spent(problem, out.choice) <= [50, 20]).all()
    assert 2 in out.choice


@pytest.mark.parametrize("name", SOLVERS)
def test_a_pair_of_budgets_that_nothing_fits(run, make_problem, name):
    # Each alone is possible: float everywhere takes 10 seconds, 4 bit everywhere 10 bytes.
    problem = network(make_problem, [20.0, 11.0])
    out = run(problem, name)
    assert out.status is Status.INFEASIBLE
    assert out.objective == out.gap == np.inf
    assert (out.nearest >= problem.budgets).all() and (out.nearest > problem.budgets).any()
    line = advice(out, problem)
    assert line.startswith("no allocation fits") and "\n" not in line
    assert f"bytes 20, nearest {out.nearest[0]:.6g}" in line
    assert f"seconds 11, nearest {out.nearest[1]:.6g}" in line
    for r in range(2):
        budgets = problem.budgets.copy()
        budgets[r] = out.nearest[r]
        assert run(replace(problem, budgets=budgets), name).status is not Status.INFEASIBLE


def test_advice_on_an_allocation_that_fits(run, make_problem):
    problem = network(make_problem, [50.0, 20.0])
    out = run(problem, "uniform")
    used = spent(problem, out.choice)
    line = advice(out, problem)
    assert f"bytes {used[0]:.6g} of 50; seconds {used[1]:.6g} of 20; gap " in line
    one = make_problem([[1.0, 0.0]], [[1.0, 2.0]], 0.5)
    assert advice(solve(one), one).endswith("(resource 0 0.5, nearest 1)")


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "lp"])
@pytest.mark.parametrize("second", ["the same", "no limit"])
def test_a_second_budget_that_says_nothing_new_changes_nothing(run, make_problem, name, second):
    rng = np.random.default_rng(2)
    value = np.sort(rng.uniform(size=(7, 4)))[:, ::-1]
    cost = np.cumsum(rng.uniform(0.1, 1, (7, 4)), axis=1)
    budget = cost[:, 1].sum() + 0.7
    other = (cost, budget) if second == "the same" else (np.ones((7, 4)), np.inf)
    sizes = np.arange(1, 8)
    one = make_problem(value, cost, budget, parameters=sizes)
    two = make_problem(value, [cost, other[0]], [budget, other[1]], parameters=sizes)
    alone, both = run(one, name), run(two, name)
    np.testing.assert_array_equal(alone.choice, both.choice)
    np.testing.assert_allclose(alone.bound, both.bound, rtol=1e-7)


@pytest.mark.parametrize("name", SOLVERS)
def test_equal_sites_are_raised_in_depth_order(run, make_problem, name):
    problem = make_problem([[1.0, 0.0]] * 6, [[1.0, 2.0]] * 6, 9.0)
    out = run(problem, name)
    assert out.choice.sum() == 3
    if name not in ("random", "evolution"):
        np.testing.assert_array_equal(out.choice, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(out.choice, run(problem, name).choice)


@pytest.mark.parametrize("resources", [1, 2])
@pytest.mark.parametrize("name", SOLVERS)
def test_thousands_of_equal_sites_come_to_an_end(run, make_problem, name, resources):
    sites, row = 3000, np.array([1.0, 2.0, 4.0])
    cost = np.broadcast_to(np.stack([row, row[::-1] + 3])[:resources, None], (resources, sites, 3))
    budget = np.array([2.0, 7.5])[:resources] * sites
    problem = make_problem(np.ones((sites, 1)) * [4.0, 1.0, 0.0], cost, budget)
    out = run(problem, name)
    assert out.status.feasible
    assert (spent(problem, out.choice) <= budget).all()
    if name in ("lp", "greedy", "uniform", "threshold"):
        np.testing.assert_allclose(out.objective, sites)
    alike = replace(problem, tie=np.zeros(sites, np.int32))
    assert set(run(alike, name).choice) == {1}


def test_a_start_is_found_in_small_problems(make_problem):
    rng = np.random.default_rng(0)
    found = possible = 0
    choices = np.array(list(itertools.product(range(3), repeat=4)))
    for _ in range(150):
        cost, limit = rng.uniform(size=(2, 4, 3)), rng.uniform(1.4, 2.0, 2)
        used = cost[:, np.arange(4), choices].sum(axis=2)
        table = feasible.rows(make_problem(np.zeros((4, 3)), cost, limit))
        found += feasible.fits(table, feasible.start(table))
        possible += (used <= limit[:, None]).all(axis=0).any()
    assert possible > 100
    assert possible - 1 <= found <= possible


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_start_is_found_on_the_frontier_of_large_problems(make_problem, rate):
    # What costs more of one resource costs less of the other; the budgets are the spending of
    # the choices that are best at one rate of exchange, so that nearly nothing else fits.
    rng = np.random.default_rng(1)
    share = np.linspace(0.05, 1, 7)
    one, two = rng.lognormal(size=(2, 200, 1)) * np.stack([share, (1 - share) ** 2])[:, None]
    best = (rate * one + two).argmin(axis=1)
    limit = [each[np.arange(200), best].sum() * 1.001 for each in (one, two)]
    table = feasible.rows(make_problem(np.zeros((200, 7)), [one, two], limit))
    assert feasible.fits(table, feasible.start(table))


def test_certify_completes_a_choice(make_problem):
    problem = make_problem([[1.0, 0.0]] * 2, [[1.0, 3.0]] * 2, 5.0)
    out = certify(problem, [1, 0])
    np.testing.assert_allclose((out.objective, out.bound, out.gap), (1.0, 0.5, 0.5))
    assert out.status is Status.ROUNDED
    np.testing.assert_allclose(out.price, [0.5])
    best = certify(replace(problem, budgets=np.array([6.0])), [1, 1])
    assert best.status is Status.OPTIMAL and best.gap == 0


def test_within_a_problem_that_nothing_fits_there_is_no_start(make_problem):
    with pytest.raises(InputError, match="cannot start: no allocation fits"):
        begin(make_problem([[1.0, 0.0]], [[1.0, 2.0]], 0.5))

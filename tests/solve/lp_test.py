"""The LP against HiGHS, brute force and its closed form; its laws and golden values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mpqdiff.aggregate import suffix_mean
from mpqdiff.errors import InputError
from mpqdiff.records import Status
from mpqdiff.solve import budget_range, lp, solve, solve_many

THETA = np.array([0.50780989, 0.44340873, 0.85416999])
SIZES = np.array([100, 400, 50])


def highs(value, cost, legal, budget):
    """The same LP by a general solver."""
    sites, choices = value.shape
    one_each = np.kron(np.eye(sites), np.ones(choices))
    bounds = [(0, 1) if ok else (0, 0) for ok in legal.ravel()]
    out = linprog(
        value.ravel(),
        A_ub=cost.ravel()[None],
        b_ub=[budget],
        A_eq=one_each,
        b_eq=np.ones(sites),
        bounds=bounds,
        method="highs-ds",
    )
    assert out.status == 0, out.message
    return out.fun


def brute_force(value, cost, legal, budget):
    """Least value of any integral allocation within budget."""
    sites = range(len(value))
    best = np.inf
    for choice in itertools.product(*(np.flatnonzero(ok) for ok in legal)):
        if sum(cost[site, k] for site, k in zip(sites, choice, strict=True)) <= budget:
            best = min(best, sum(value[s, k] for s, k in zip(sites, choice, strict=True)))
    return best


def knapsack(theta, n, budget, lo, hi):
    """Bits of the fractional knapsack in closed form, layer by layer."""
    bits, rest = np.full(len(n), float(lo)), budget - lo * n.sum()
    for layer in np.argsort(-theta / n, kind="stable"):
        extra = min(rest, n[layer] * (hi - lo))
        bits[layer] += extra / n[layer]
        rest -= extra
    return bits


@st.composite
def instances(draw):
    """Small problems of three shapes (so that few are compiled), many with ties and holes."""
    sites, choices = draw(st.sampled_from([(1, 3), (4, 2), (5, 4)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    style = draw(st.sampled_from(["real", "integer", "flat", "wild"]))
    shape = (sites, choices)
    if style == "real":  # value falls and cost rises with bits
        value = np.sort(rng.uniform(size=shape), axis=1)[:, ::-1]
        cost = np.sort(rng.uniform(0.1, 1, size=shape), axis=1)
    elif style == "integer":  # few distinct numbers, so many equal slopes
        value = rng.integers(0, 4, shape).astype(float)
        cost = rng.integers(0, 4, shape).astype(float)
    elif style == "flat":
        value, cost = np.zeros(shape), np.ones(shape) * rng.integers(1, 3, (sites, 1))
    else:  # no order at all, twelve orders of magnitude
        value, cost = 10.0 ** rng.uniform(-6, 6, shape), rng.uniform(size=shape)
    legal = rng.uniform(size=shape) < draw(st.sampled_from([0.6, 1.0]))
    legal[np.arange(sites), rng.integers(0, choices, sites)] = True
    return value, cost, legal, draw(st.floats(0, 1.1))


@settings(max_examples=80, deadline=None)
@given(instances())
def test_bound_is_the_lp_and_rounding_is_feasible(make_problem, instance):
    value, cost, legal, share = instance
    (least,), (most,) = budget_range(make_problem(value, cost, 0, legal=legal))
    budget = least + share * (most - least)
    out = solve(make_problem(value, cost, budget, legal=legal), "lp")
    sites = np.arange(len(value))
    assert legal[sites, out.choice].all()
    assert cost[sites, out.choice].sum() <= budget * (1 + 1e-12)
    np.testing.assert_allclose(out.objective, value[sites, out.choice].sum(), rtol=1e-12)
    assert out.bound <= out.objective
    assert out.gap == out.objective - out.bound
    expected = highs(value, cost, legal, budget * (1 + 1e-12))
    # HiGHS's own tolerances are absolute, in units of the largest value.
    np.testing.assert_allclose(out.bound, expected, rtol=1e-7, atol=1e-9 * value.max())
    best = brute_force(value, cost, legal, budget * (1 + 1e-12))
    assert out.bound <= best * (1 + 1e-9)
    assert best <= out.objective * (1 + 1e-9)


def test_whole_number_costs_are_never_exceeded(make_problem):
    rng = np.random.default_rng(0)
    n = rng.integers(1, 10**7, (30, 1))
    cost, value = n * np.array([2, 3, 4, 8]), np.sort(rng.uniform(size=(30, 4)))[:, ::-1]
    problem = make_problem(value, cost, 0, bits=[2, 3, 4, 8])
    (least,), (most,) = budget_range(problem)
    budgets = [*np.linspace(least, most, 40).astype(int), int(least), int(most)]
    for budget, out in zip(budgets, solve_many(problem, budgets), strict=True):
        assert cost[np.arange(30), out.choice].sum() <= budget
    assert (out.choice == 3).all()
    assert out.status is Status.OPTIMAL


@pytest.mark.parametrize("theta", [THETA, suffix_mean(THETA)], ids=["plain", "suffix"])
def test_golden_allocation(linear_problem, theta):
    out = solve(linear_problem(theta, SIZES, 4 * 550))
    np.testing.assert_allclose(out.fractional, [8, 2.5, 8])
    bits = np.arange(2, 9)[out.choice]
    np.testing.assert_array_equal(bits, [8, 2, 8])
    assert 4 * 550 - SIZES @ bits == 200
    assert out.status is Status.ROUNDED
    np.testing.assert_allclose(out.gap, theta[1] / 2)


def test_rounding_keeps_the_widths_between_the_ends(linear_problem):
    out = solve(linear_problem(THETA, SIZES, 4 * 550 + 2 * 400 + 200))
    np.testing.assert_allclose(out.fractional, [8, 5, 8])
    np.testing.assert_array_equal(np.arange(2, 9)[out.choice], [8, 5, 8])
    assert out.status is Status.OPTIMAL


@pytest.mark.parametrize("bits", [(2, 8), (2, 3, 4, 5, 6, 7, 8), (2, 4, 8)])
def test_closed_form_with_at_most_one_fractional_site(linear_problem, bits):
    rng = np.random.default_rng(len(bits))
    for _ in range(40):
        theta, n = rng.uniform(0.1, 1, 12), rng.integers(10, 1000, 12)
        budget = float(n.sum() * rng.uniform(2, 8))
        out = solve(linear_problem(theta, n, budget, bits))
        np.testing.assert_allclose(out.fractional, knapsack(theta, n, budget, 2, 8), atol=1e-9)
        assert sum(2 + 1e-9 < b < 8 - 1e-9 for b in out.fractional) <= 1
        np.testing.assert_allclose(out.fractional @ n, budget)


def test_more_budget_never_takes_bits_away(make_problem):
    rng = np.random.default_rng(3)
    value = np.sort(rng.uniform(size=(9, 5)))[:, ::-1]
    cost = np.cumsum(rng.uniform(0.1, 1, (9, 5)), axis=1)
    problem = make_problem(value, cost, 0)
    budgets = np.linspace(*budget_range(problem), 25)[:, 0]
    out = solve_many(problem, budgets)
    assert (np.diff([o.fractional for o in out], axis=0) >= -1e-9).all()
    assert (np.diff([o.bound for o in out]) <= 1e-12).all()
    for one, budget in zip(out[::8], budgets[::8], strict=True):
        alone = solve(make_problem(value, cost, budget))
        np.testing.assert_array_equal(one.choice, alone.choice)
        assert one.bound == alone.bound


def test_laws_of_the_linear_objective(linear_problem):
    rng = np.random.default_rng(4)
    theta, n = rng.uniform(0.1, 1, 10), rng.integers(10, 1000, 10)
    budget = 4.2 * n.sum()
    before = solve(linear_problem(theta, n, budget))
    for other in (
        linear_problem(theta * 1e-250, n, budget),
        linear_problem(theta * 1e250, n, budget),
        linear_problem(theta, n * 1024, budget * 1024),
    ):
        after = solve(other)
        np.testing.assert_array_equal(after.choice, before.choice)
        np.testing.assert_allclose(after.fractional, before.fractional, rtol=1e-9)
    for site in range(10):
        raised = theta.copy()
        raised[site] *= 1.5
        after = solve(linear_problem(raised, n, budget))
        assert after.fractional[site] >= before.fractional[site] - 1e-9


def test_permuting_the_importance_changes_the_allocation(linear_problem):
    rng = np.random.default_rng(5)
    theta = np.exp(-10 * rng.uniform(0.3, 0.9, 16))
    n = np.repeat([100, 400], 8)
    choices = [solve(linear_problem(rng.permutation(theta), n, 4 * n.sum())).choice for _ in "ab"]
    assert (choices[0] != choices[1]).sum() >= 4


def test_equal_slopes_go_to_the_earlier_site(linear_problem):
    out = solve(linear_problem(np.ones(4), np.full(4, 100), 4 * 100 * 5 + 0.0))
    np.testing.assert_array_equal(np.arange(2, 9)[out.choice], [8, 8, 2, 2])


def test_hull_skips_choices_that_a_mixture_beats(make_problem):
    # 3 bits costs almost what 4 do and saves little: no budget but an exact one wants it.
    value, cost = [[1.0, 0.9, 0.0]] * 2, [[1.0, 1.9, 2.0]] * 2
    with jax.enable_x64(True):
        vertex = lp.hull(jnp.asarray(cost), jnp.asarray(value), jnp.ones((2, 3), bool))
    np.testing.assert_array_equal(vertex, [[0, 2, 2]] * 2)
    out = solve(make_problem(value, cost, 3.0))
    np.testing.assert_array_equal(out.choice, [2, 0])
    assert out.status is Status.OPTIMAL


def test_a_single_choice_per_site(make_problem):
    out = solve(make_problem([[1.0], [2.0]], [[3.0], [4.0]], 7.0))
    np.testing.assert_array_equal(out.choice, [0, 0])
    assert (out.objective, out.gap) == (3.0, 0.0)


def count_equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for leaf in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(leaf, "jaxpr", leaf)
            total += count_equations(inner) if hasattr(inner, "eqns") else 0
    return total


def test_traced_operations_do_not_depend_on_sites_choices_or_budgets():
    def count(sites, choices, budgets):
        with jax.enable_x64(True):
            table = jnp.ones((sites, choices))
            legal, bits = jnp.ones((sites, choices), bool), jnp.arange(choices)
            traced = jax.make_jaxpr(lp.relax)(table, table, legal, bits, jnp.ones(budgets))
        return count_equations(traced.jaxpr)

    assert count(3, 2, 1) == count(40, 2, 9) == count(17, 7, 30) > 60
    with jax.enable_x64(True):
        text = str(
            jax.make_jaxpr(lp.relax)(
                jnp.ones((3, 2)), jnp.ones((3, 2)), jnp.ones((3, 2), bool), jnp.ones(2), jnp.ones(1)
            )
        )
    assert "callback" not in text


def test_double_precision_stays_inside(linear_problem):
    # 1 part in 1e9 decides here: float32 would see a tie and favour the earlier site.
    out = solve(linear_problem([1.0, 1.0 + 1e-9], [100, 100], 1000))
    np.testing.assert_array_equal(out.choice, [0, 6])
    assert jnp.zeros(1).dtype == jnp.float32
    assert not jax.config.jax_enable_x64


def dual(problem, price, budget):
    """The Lagrangian bound at `price`: what holds whatever the price, and is tight at the best."""
    value = np.where(problem.legal, problem.value + price * problem.resources[0], np.inf)
    return value.min(axis=1).sum() - price * (budget - problem.fixed[0])


def test_the_price_is_the_dual(make_problem):
    rng = np.random.default_rng(6)
    value, cost = rng.uniform(size=(9, 5)), rng.uniform(0.1, 1, (9, 5))
    problem = make_problem(value, cost, 0, fixed=2.0)
    (least,), (most,) = budget_range(problem)
    budgets = np.linspace(least, most, 12)
    for budget, out in zip(budgets, solve_many(problem, budgets), strict=True):
        assert out.price.shape == (1,)
        np.testing.assert_allclose(dual(problem, out.price[0], budget), out.bound, atol=1e-9)
    assert out.price[0] == 0  # all the budget cannot be used
    assert solve_many(problem, [np.inf])[0].price[0] == 0


def test_golden_price(linear_problem):
    # Site 1 is raised at 2200: half a unit of value for 400 of cost. At 7500 nothing is left.
    at = solve_many(linear_problem(THETA, SIZES, 0), [2200, 550 * 8, 1100])
    np.testing.assert_allclose(at[0].price, THETA[1] / 400)
    np.testing.assert_allclose(at[1].price, 0)
    np.testing.assert_allclose(at[2].price, (THETA / SIZES).max())


def test_below_the_minimum_is_infeasible_and_says_the_minimum(linear_problem):
    problem = linear_problem(THETA, SIZES, 1099, fixed=30)
    fits, out = solve_many(problem, [1130, 1129])
    assert fits.choice.sum() == 0 and fits.status.feasible
    assert out.status is Status.INFEASIBLE
    np.testing.assert_array_equal(out.nearest, [1130])
    assert out.objective == out.gap == np.inf
    np.testing.assert_array_equal(out.choice, 0)
    assert solve(problem).status is Status.INFEASIBLE


def test_exact_closes_the_gap_of_one_budget(make_problem):
    rng = np.random.default_rng(8)
    closed = 0
    for _ in range(6):
        value = np.sort(rng.uniform(size=(5, 4)))[:, ::-1]
        cost = np.cumsum(rng.uniform(0.1, 1, (5, 4)), axis=1)
        budget = cost[:, 1].sum() + rng.uniform()
        problem = make_problem(value, cost, budget)
        rounded, out = solve(problem), solve(problem, exact=True)
        best = brute_force(value, cost, problem.legal, budget)
        assert out.status is Status.OPTIMAL
        np.testing.assert_allclose(out.objective, best)
        closed += rounded.objective > out.objective
    assert closed > 0
    assert solve(make_problem(value, cost, 0.0), exact=True).status is Status.INFEASIBLE


def test_budgets_of_another_shape_or_nan_are_refused(linear_problem):
    problem = linear_problem(THETA, SIZES, 2200)
    for budgets in (2200.0, [], [[1.0, 2.0]]):
        with pytest.raises(InputError, match=r"budgets have shape .*, expected \[M\] or \[M,1\]"):
            solve_many(problem, budgets)
    with pytest.raises(InputError, match="expected numbers"):
        solve_many(problem, [2200, np.nan])

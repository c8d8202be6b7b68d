"""Laws of the planner under several budgets, for problems drawn by hypothesis."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.records import Problem, Status
from mpqdiff.solve import barrier, interior, relaxation, vertex
from mpqdiff.solve.feasible import fits, rows, spent

CHOICES, RESOURCES = 4, 3


@st.composite
def problems(draw) -> Problem:
    """Up to 8 sites (one shape after padding), with holes, pins, ties and idle budgets."""
    sites = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    style = draw(st.sampled_from(["real", "integer", "flat", "wild", "ordered"]))
    value = rng.random((sites, CHOICES))
    cost = rng.random((RESOURCES, sites, CHOICES))
    if style == "integer":
        value, cost = np.floor(4 * value), np.floor(4 * cost)
    elif style == "flat":
        value = np.zeros_like(value)
    elif style == "wild":
        value = 10.0 ** (12 * value - 6)
    elif style == "ordered":
        value, cost = np.sort(value)[:, ::-1], np.sort(cost)
    legal = rng.random(value.shape) < draw(st.sampled_from([0.4, 0.7, 1.0]))
    legal[np.arange(sites), rng.integers(0, CHOICES, sites)] = True
    low = np.where(legal, cost, np.inf).min(axis=2).sum(axis=1)
    high = np.where(legal, cost, -np.inf).max(axis=2).sum(axis=1)
    share = rng.uniform(draw(st.sampled_from([-0.1, 0.0, 0.4])), 1.1, RESOURCES)
    share = np.where(rng.random(RESOURCES) < 0.15, np.round(share), share)
    return Problem(
        value=value,
        resources=cost,
        fixed=np.zeros(RESOURCES),
        budgets=low + share * (high - low),
        w_bits=np.arange(2, 2 + CHOICES, dtype=np.int32),
        a_bits=np.full(CHOICES, 8, np.int32),
        legal=legal,
        tie=np.arange(sites, dtype=np.int32),
        parameters=np.ones(sites, int),
    )


def close(one: float, other: float, problem: Problem) -> bool:
    """Equal to what sums of these values can be."""
    size = np.abs(np.where(problem.legal, problem.value, 0)).max(axis=1).sum()
    return abs(one - other) <= 1e-9 * size


@settings(max_examples=60, deadline=None)
@given(problems())
def test_never_over_budget_never_below_the_bound_and_pins_kept(problem):
    found = interior.solve(problem)
    if not found.status.feasible:
        assert found.objective == found.gap == np.inf
        if found.status is Status.INFEASIBLE:
            assert ((found.nearest > problem.budgets * (1 - 1e-9)) | np.isnan(found.nearest)).all()
        return
    assert found.status in (Status.OPTIMAL, Status.ROUNDED)
    assert fits(rows(problem), found.choice)
    assert found.bound <= found.objective
    assert found.objective == pytest.approx(spent(problem.value, found.choice))
    assert found.gap == found.objective - found.bound or found.gap == pytest.approx(
        found.objective - found.bound, abs=1e-9 * abs(found.objective)
    )
    assert problem.legal[np.arange(len(problem.value)), found.choice].all()
    assert (found.price >= 0).all()
    split = ~np.isclose(found.fractional, np.round(found.fractional), atol=1e-9)
    assert split.sum() <= RESOURCES


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, RESOURCES - 1), st.floats(0, 0.5))
def test_more_budget_worsens_neither_the_bound_nor_the_optimum(problem, resource, more):
    budgets = problem.budgets.copy()
    budgets[resource] *= 1 + more
    richer = problem.replace(budgets=budgets)
    before, after = interior.solve(problem, exact=True), interior.solve(richer, exact=True)
    if not before.status.feasible:
        return
    assert after.status is Status.OPTIMAL
    assert after.objective <= before.objective + 1e-9 * abs(before.objective)
    low, high = interior.bound(richer)[0], interior.bound(problem)[0]
    assert low <= high or close(low, high, problem)


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_bound_knows_neither_units_nor_order(problem, seed):
    if interior.solve(problem).status is Status.INFEASIBLE:
        return
    rng = np.random.default_rng(seed)
    value, unit = 10.0 ** rng.uniform(-6, 6), 10.0 ** rng.uniform(-6, 6, RESOURCES)
    sites, choices = rng.permutation(len(problem.value)), rng.permutation(CHOICES)
    other = problem.replace(
        value=value * problem.value[sites][:, choices],
        resources=unit[:, None, None] * problem.resources[:, sites][:, :, choices],
        budgets=unit * problem.budgets,
        legal=problem.legal[sites][:, choices],
    )
    assert close(interior.bound(other)[0] / value, interior.bound(problem)[0], problem)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_prices_alone_prove_the_bound(problem):
    found = interior.solve(problem)
    if found.status is Status.INFEASIBLE:
        return
    table = rows(problem)
    priced = table.value + np.einsum("r,rlk->lk", found.price, table.cost)
    dual = np.where(table.legal, priced, np.inf).min(axis=1).sum() - found.price @ table.limit
    assert close(dual, found.bound, problem)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_a_budget_that_is_said_to_be_nearest_fits(problem):
    found = interior.solve(problem)
    if found.status is not Status.INFEASIBLE:
        return
    for resource in np.flatnonzero(np.isfinite(found.nearest)):
        budgets = problem.budgets.copy()
        budgets[resource] = found.nearest[resource]
        assert interior.solve(problem.replace(budgets=budgets)).status.feasible


def test_at_the_iteration_cap_the_bound_still_holds(monkeypatch):
    rng = np.random.default_rng(0)
    value, cost = np.sort(rng.random((8, 4)))[:, ::-1], np.sort(rng.random((3, 8, 4)))
    problem = Problem(
        value=value,
        resources=cost,
        fixed=np.zeros(3),
        budgets=(cost.min(axis=2) + cost.max(axis=2)).sum(axis=1) / 2,
        w_bits=np.arange(2, 6, dtype=np.int32),
        a_bits=np.full(4, 8, np.int32),
        legal=np.ones((8, 4), bool),
        tie=np.arange(8, dtype=np.int32),
        parameters=np.ones(8, int),
    )
    best = interior.solve(problem, exact=True)
    monkeypatch.setattr(barrier, "CAP", 1)
    monkeypatch.setattr(vertex, "PIVOTS", 0)
    # Constants are in what was traced: trace again.
    fresh, finish = relaxation._relax_many.__wrapped__, relaxation._finish
    monkeypatch.setattr(relaxation, "_finish", lambda *parts: finish(*parts))
    monkeypatch.setattr(relaxation, "_relax_many", jax.jit(lambda *lanes: fresh(*lanes)))
    found = interior.solve(problem)
    assert found.status is Status.ITERATION_LIMIT
    assert found.bound < best.bound <= best.objective <= found.objective
    assert fits(rows(problem), found.choice)

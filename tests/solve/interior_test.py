"""The LP under several budgets: HiGHS, vertices, duplicates, contradictions, traced size."""

import jax
import numpy as np
import pytest
import scipy.sparse as sparse
from scipy.optimize import linprog

from mpqdiff.records import Problem, Status
from mpqdiff.solve import interior, relaxation
from mpqdiff.solve.feasible import fits, rows, spent

STYLES = ("sizes", "uniform", "integers", "duplicates", "flat", "free")
BUDGETS = ("inside", "least", "edge", "ample")
SITES, CHOICES, RESOURCES = 120, 4, 3


def problem_of(value, cost, budgets, legal=None, fixed=None) -> Problem:
    sites, choices = value.shape
    bits = np.arange(2, 2 + choices, dtype=np.int32)
    return Problem(
        value=np.asarray(value, float),
        resources=np.asarray(cost, float),
        fixed=np.zeros(len(cost)) if fixed is None else fixed,
        budgets=np.asarray(budgets, float),
        w_bits=bits,
        a_bits=bits,
        legal=np.ones(value.shape, bool) if legal is None else legal,
        tie=np.arange(sites, dtype=np.int32),
        parameters=np.ones(sites, int),
    )


def instance(seed: int, style: str, kind: str, sites: int = SITES) -> Problem:
    """A problem of 4 choices and 3 resources, with pins and holes."""
    rng = np.random.default_rng(seed)
    shape = (sites, CHOICES)
    bits = np.arange(2, 2 + 2 * CHOICES, 2)
    value = np.exp(rng.normal(0, 1.5, sites))[:, None] * 4.0**-bits
    size = np.ceil(np.exp(rng.normal(8, 1.5, sites)))
    cost = size[:, None] * bits * np.exp(rng.normal(0, 0.4, (RESOURCES, *shape)))
    if style == "uniform":
        value, cost = rng.random(shape), rng.random(cost.shape)
    elif style == "integers":
        value = rng.integers(0, 4, shape).astype(float)
        cost = rng.integers(0, 4, cost.shape).astype(float)
    elif style == "duplicates":
        kinds = rng.integers(0, 2, sites)
        value, cost = value[kinds], cost[:, kinds]
    elif style == "flat":
        value = np.ones(shape)
    elif style == "free":
        cost *= rng.random(cost.shape) < 0.5
    legal = rng.random(shape) < 0.8
    legal[rng.random(sites) < 0.1] = False
    legal[np.arange(sites), rng.integers(0, CHOICES, sites)] = True
    least = np.where(legal, cost, np.inf).min(axis=2).sum(axis=1)
    most = np.where(legal, cost, -np.inf).max(axis=2).sum(axis=1)
    budgets = least + rng.uniform(0.3, 0.9, RESOURCES) * (most - least)
    if kind == "least":
        budgets[0] = least[0]
    elif kind == "edge":
        choice = np.where(legal, rng.random(shape), -1).argmax(axis=1)
        budgets = spent(cost, choice)
    elif kind == "ample":
        budgets = np.array([*(most[:-1] * 1.5), np.inf])
    return problem_of(value, cost, budgets, legal)


def highs(problem: Problem) -> float:
    """The LP's value, inf where nothing fits; values and costs above each site's least, of mean
    1, to 1e-10."""
    table = rows(problem)
    sites, choices = table.value.shape
    low = np.where(table.legal, table.cost, np.inf).min(axis=2)
    cost = np.where(table.legal, table.cost - low[..., None], 0)
    unit = np.maximum(cost.mean(axis=(1, 2)), 1e-300)
    base = np.where(table.legal, table.value, np.inf).min(axis=1)
    value = np.where(table.legal, table.value - base[:, None], 0)
    scale = max(value.mean(), 1e-300)
    finite = np.isfinite(table.limit)
    out = linprog(
        value.ravel() / scale,
        A_ub=sparse.csr_matrix((cost / unit[:, None, None]).reshape(len(cost), -1)[finite]),
        b_ub=((table.limit - low.sum(axis=1)) / unit)[finite],
        A_eq=sparse.kron(sparse.eye(sites), np.ones((1, choices))),
        b_eq=np.ones(sites),
        bounds=[(0, float(ok)) for ok in table.legal.ravel()],
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if out.status == 2:
        return np.inf
    assert out.status == 0, out.message
    return base.sum() + scale * out.fun


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("style", STYLES)
def test_bound_is_the_value_that_highs_finds(style, kind):
    problem = instance(STYLES.index(style) + 10 * BUDGETS.index(kind), style, kind)
    found = interior.solve(problem)
    reference = highs(problem)
    if np.isinf(reference):
        assert found.status is Status.INFEASIBLE
        return
    assert found.bound == pytest.approx(reference, rel=1e-7, abs=1e-12)
    assert found.status in (Status.OPTIMAL, Status.ROUNDED)
    assert fits(rows(problem), found.choice)
    assert problem.legal[np.arange(SITES), found.choice].all()
    assert found.bound <= found.objective
    assert found.objective == pytest.approx(spent(problem.value, found.choice))
    value, price = interior.bound(problem)
    assert value == pytest.approx(found.bound)
    assert (price >= 0).all()


@pytest.mark.parametrize("style", STYLES)
def test_prices_certify_the_bound_and_the_vertex_splits_few_sites(style):
    problem = instance(77, style, "inside")
    found = interior.solve(problem)
    table = rows(problem)
    priced = table.value + np.einsum("r,rlk->lk", found.price, table.cost)
    dual = np.where(table.legal, priced, np.inf).min(axis=1).sum() - found.price @ table.limit
    assert dual == pytest.approx(found.bound, rel=1e-9, abs=1e-12)
    split = ~np.isclose(found.fractional, np.round(found.fractional), atol=1e-9)
    assert split.sum() <= RESOURCES
    low = np.where(problem.legal, problem.w_bits, 99).min(axis=1)
    high = np.where(problem.legal, problem.w_bits, 0).max(axis=1)
    assert (found.fractional >= low - 1e-9).all() and (found.fractional <= high + 1e-9).all()


def test_thousands_of_duplicates_split_at_most_as_many_sites_as_there_are_budgets():
    sites = 2500
    bits = np.array([2, 4, 6, 8])
    value = np.tile(4.0**-bits, (sites, 1))
    cost = np.stack([np.tile(bits, (sites, 1)), np.tile(bits**1.5, (sites, 1)),
                     np.tile([3.0, 1.0, 2.0, 4.0], (sites, 1))])  # fmt: skip
    budgets = np.array([4.513, 8.871, 2.219]) * sites
    found = interior.solve(problem_of(value, cost, budgets))
    one = linprog(value[0], A_ub=cost[:, 0], b_ub=budgets / sites, A_eq=[np.ones(4)], b_eq=[1])
    assert found.bound == pytest.approx(sites * one.fun, rel=1e-7)
    split = ~np.isclose(found.fractional, np.round(found.fractional), atol=1e-7)
    assert split.sum() <= RESOURCES
    assert found.gap <= RESOURCES * value[0].max()


def contradiction() -> Problem:
    """Each site spends 1 of one resource or 1 of the other; neither budget excludes the rest."""
    cost = np.zeros((3, 8, 4))
    cost[0] = [0, 1, 1, 2]
    cost[1] = [2, 1, 1, 0]
    value = np.random.default_rng(0).random((8, 4))
    return problem_of(value, cost, [7, 7, 1])


@pytest.mark.parametrize("exact", [False, True])
def test_contradictory_budgets_are_infeasible_and_nearest_fits(exact):
    problem = contradiction()
    found = interior.solve(problem, exact=exact)
    assert found.status is Status.INFEASIBLE
    assert found.objective == found.gap == np.inf
    np.testing.assert_array_equal(found.nearest, [9, 9, np.inf])
    for resource in (0, 1):
        budgets = problem.budgets.copy()
        budgets[resource] = found.nearest[resource]
        assert interior.solve(problem.replace(budgets=budgets)).status.feasible
        budgets[resource] -= 0.5
        assert interior.solve(problem.replace(budgets=budgets)).status is Status.INFEASIBLE


def test_one_front_never_pays_more_for_more_and_agrees_with_single_solves():
    problem = instance(5, "sizes", "inside")
    low = np.where(problem.legal, problem.resources, np.inf).min(axis=2).sum(axis=1)
    budgets = low + np.linspace(-0.05, 1.2, 14)[:, None] * (problem.budgets - low)
    front = interior.solve_many(problem, budgets)
    assert front[0].status is Status.INFEASIBLE
    assert not np.isnan(front[0].nearest).any()
    for row, found in zip(budgets[1:], front[1:], strict=True):
        alone = interior.solve(problem.replace(budgets=row))
        assert alone.status.feasible == found.status.feasible
        assert found.bound == pytest.approx(alone.bound, rel=1e-9)
        assert found.objective <= alone.objective * (1 + 1e-12)
    assert (np.diff([found.objective for found in front[1:]]) <= 0).all()
    assert (np.diff([found.bound for found in front[1:]]) <= 1e-12).all()


def test_fixed_costs_only_shift_the_budgets():
    problem = instance(6, "sizes", "inside")
    fixed = np.array([1e3, 5.0, 0.0])
    shifted = problem.replace(fixed=fixed, budgets=problem.budgets + fixed)
    plain, other = interior.solve(problem), interior.solve(shifted)
    assert other.bound == pytest.approx(plain.bound, rel=1e-9)
    np.testing.assert_array_equal(other.choice, plain.choice)


def test_budgets_without_end_leave_every_site_its_best():
    problem = instance(7, "uniform", "inside").replace(budgets=np.full(3, np.inf))
    found = interior.solve(problem)
    best = np.where(problem.legal, problem.value, np.inf).min(axis=1)
    assert found.status is Status.OPTIMAL
    assert found.objective == pytest.approx(best.sum())
    np.testing.assert_array_equal(found.price, 0)


def equations(jaxpr) -> int:
    """Equations of a jaxpr and of all that it contains."""
    count = 0
    for eqn in jaxpr.eqns:
        count += 1
        for value in jax.tree.leaves(
            eqn.params, is_leaf=lambda each: hasattr(each, "eqns") or hasattr(each, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                count += equations(inner)
    return count


def traced(lanes: int, sites: int, choices: int) -> int:
    with jax.enable_x64(True):
        shape = jax.ShapeDtypeStruct
        rows_of = shape((lanes, RESOURCES), float)
        return equations(
            jax.make_jaxpr(relaxation._relax_many)(
                shape((1 + RESOURCES, choices, sites), float),
                shape((RESOURCES, choices, sites), float),
                shape((lanes,), np.int32),
                shape((lanes, choices, sites), bool),
                rows_of,
                rows_of,
                shape((lanes,), float),
            ).jaxpr
        )


def test_traced_size_depends_on_neither_sites_choices_nor_budgets():
    base = traced(2, 8, 3)
    assert base > 100
    assert traced(64, 8, 3) == traced(2, 512, 3) == traced(2, 8, 15) == base

"""The allocation under any number of budgets: LP, vertex, rounding, bound, and what to say of it.

The LP is solved by an interior-point path with an entropy barrier and a simplex clean-up; see
`relaxation` and the modules that it names. `exact=True` closes the gap by branch and bound.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from mpqdiff.records import Allocation, Problem, Status
from mpqdiff.solve import exact as branch_and_bound
from mpqdiff.solve import infeasible
from mpqdiff.solve.feasible import Rows, fits, rows, spent
from mpqdiff.solve.relaxation import Relaxed, Scaled, relax_many, scale

CLOSED = 1e-9  # relative gap that counts as none
JUDGE_NODES = 200  # LPs that may be spent on the least budget of one resource


def _bits(problem: Problem, out: Relaxed, lane: int, sites: int) -> np.ndarray:
    """Mean w_bits of each site at the vertex, float64 [L]."""
    bits = np.asarray(problem.w_bits, np.float64)
    mean = bits[out.key[lane][:sites]]
    split = out.site[lane] < sites
    at, pick = out.site[lane][split], out.pick[lane][split]
    np.add.at(mean, at, out.amount[lane][split] * (bits[pick] - bits[out.key[lane][at]]))
    return mean


def _rounded(objective: float, gap: float, solved: bool) -> Status:
    if gap <= CLOSED * abs(objective):
        return Status.OPTIMAL
    return Status.ROUNDED if solved else Status.ITERATION_LIMIT


def _allocation(problem: Problem, table: Rows, scaled: Scaled, out: Relaxed, lane: int):
    """The record of one lane; UNDECIDED where its choice does not fit."""
    unit = scaled.value_unit[0]
    choice = out.choice[lane][: scaled.sites].astype(np.int32)
    price = out.price[lane] * unit / scaled.cost_unit
    bound = float(scaled.value_base[0] + unit * out.bound[lane])
    known: dict[str, Any] = {"price": price, "fractional": _bits(problem, out, lane, scaled.sites)}
    if not (out.fits[lane] and fits(table, choice)):
        return Allocation(choice, np.inf, bound, np.inf, Status.UNDECIDED, **known)
    objective = float(spent(table.value, choice))
    gap = max(float(unit * out.gap[lane]), 0.0)
    status = _rounded(objective, gap, bool(out.solved[lane]))
    return Allocation(choice, objective, objective - gap, gap, status, **known)


def _lend(tables: list[Rows], found: list[Allocation]) -> list[Allocation]:
    """Where the choice found for other budgets fits and is better, take it: with it more budget
    never costs value."""
    used = np.stack([spent(tables[0].cost, each.choice) for each in found])
    worth = np.array([each.objective for each in found])
    lent = []
    for table, each in zip(tables, found, strict=True):
        best = int(np.argmin(np.where((used <= table.limit).all(axis=1), worth, np.inf)))
        if worth[best] < each.objective:
            each = _take(each, found[best].choice, float(worth[best]))
        lent.append(each)
    return lent


def _take(found: Allocation, choice, objective: float) -> Allocation:
    """`found`, with a better choice."""
    bound = min(found.bound, objective)
    status = _rounded(objective, objective - bound, found.status is not Status.ITERATION_LIMIT)
    return replace(found, choice=choice, objective=objective, bound=bound,
                   gap=objective - bound, status=status)  # fmt: skip


def _settle(table: Rows, found: Allocation, verdict: infeasible.Verdict, fixed, cut: bool):
    """`found`, UNDECIDED so far, in the light of the least-cost problems."""
    if verdict.choice is not None:
        choice = infeasible.improve(table, verdict.choice)
        return _take(found, choice, float(spent(table.value, choice)))
    if not (verdict.infeasible or cut):
        return found
    return _infeasible(found, fixed + verdict.least)


def _infeasible(found: Allocation, nearest) -> Allocation:
    return replace(found, objective=np.inf, bound=np.inf, gap=np.inf, status=Status.INFEASIBLE,
                   nearest=nearest, price=None, fractional=None)  # fmt: skip


def solve_many(problem: Problem, budgets) -> list[Allocation]:
    """One allocation for each of `budgets` [M,R], their LPs in one compiled call.

    `problem` is valid and without ties; its own budgets play no part. `bound` and `price` are
    the LP's. Budgets that no allocation fits give INFEASIBLE, with `nearest` as the rounded LPs
    find it: such a budget does fit. Where rounding found no allocation, though the LP does not
    exclude one, the status is UNDECIDED.
    """
    budgets = np.atleast_2d(np.asarray(budgets, np.float64))
    tables = [rows(problem, each) for each in budgets]
    limits = np.stack([table.limit for table in tables])
    scaled = scale(tables[0])
    out = relax_many(scaled, limits, budgets)
    found = [_allocation(problem, table, scaled, out, m) for m, table in enumerate(tables)]
    found = _lend(tables, found)
    open_lanes = [lane for lane, each in enumerate(found) if not each.status.feasible]
    if open_lanes:
        verdicts = infeasible.judge(
            tables[0], scaled, limits[open_lanes], budgets[open_lanes], JUDGE_NODES
        )
        fixed = np.asarray(problem.fixed, np.float64)
        for lane, verdict in zip(open_lanes, verdicts, strict=True):
            cut = bool(out.cut[lane])
            found[lane] = _settle(tables[lane], found[lane], verdict, fixed, cut)
    return found


def solve(problem: Problem, *, exact: bool = False, node_limit: int = 10_000) -> Allocation:
    """The allocation at the problem's own budgets; see `solve_many`.

    `exact` searches for what closes the gap: then OPTIMAL, INFEASIBLE (with `nearest` searched
    for as well), or, after `node_limit` LPs, NODE_LIMIT with the gap that is left (UNDECIDED where
    nothing that fits was found).
    """
    budgets = np.asarray(problem.budgets, np.float64)
    found = solve_many(problem, budgets[None])[0]
    if not exact or found.status is Status.OPTIMAL:
        return found
    table = rows(problem)
    if found.status is not Status.INFEASIBLE:
        start = found.choice if found.status.feasible else None
        end = branch_and_bound.search(
            table, budgets, choice=start, objective=found.objective, node_limit=node_limit
        )
        if end.choice is not None:
            return _searched(found, end)
        if not end.complete:
            return replace(found, bound=max(found.bound, end.bound))
    least = [
        infeasible.amount(infeasible.least(table, budgets, r, node_limit))
        for r in range(len(budgets))
    ]
    return _infeasible(found, np.asarray(problem.fixed, np.float64) + least)


def _searched(found: Allocation, end: branch_and_bound.Found) -> Allocation:
    bound = min(max(found.bound, end.bound), end.objective)
    gap = end.objective - bound
    status = Status.OPTIMAL if gap <= CLOSED * abs(end.objective) else Status.NODE_LIMIT
    choice = np.asarray(end.choice, np.int32)
    return replace(
        found, choice=choice, objective=end.objective, bound=bound, gap=gap, status=status
    )


def bound(problem: Problem) -> tuple[float, np.ndarray]:
    """(lower bound of every allocation within the problem's budgets, price [R]) by the LP."""
    budgets = np.asarray(problem.budgets, np.float64)
    table = rows(problem)
    scaled = scale(table)
    out = relax_many(scaled, table.limit[None], budgets[None])
    unit = scaled.value_unit[0]
    lower = float(scaled.value_base[0] + unit * out.bound[0])
    return lower, out.price[0] * unit / scaled.cost_unit

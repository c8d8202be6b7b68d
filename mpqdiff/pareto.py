"""The front of a problem as data: `pareto.json`, one point per budget."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpqdiff import solve
from mpqdiff.errors import InputError
from mpqdiff.explain import names
from mpqdiff.records import Allocation, Problem
from mpqdiff.sites import Site

SCHEMA = 1


def budgets_between(problem: Problem, count: int) -> np.ndarray:
    """`count` budgets, float64 [count,R]: the first resource from the least to the most that legal
    allocations can spend of it, evenly; the others at the problem's own budgets.

    The least of one resource may not fit the others' budgets: that point is then infeasible.
    Raises InputError on fewer than two, and where the first resource can take only one value.
    """
    if count < 2:
        raise InputError(f"a front of {count} points: expected at least 2, its two ends")
    least, most = (float(end[0]) for end in solve.budget_range(problem))
    if not least < most:
        raise InputError(
            f"every legal allocation spends {least:.9g} {names(problem)[0]}: there is no front; "
            "budget another resource first, or allow more widths"
        )
    budgets = np.tile(np.asarray(problem.budgets, np.float64), (count, 1))
    budgets[:, 0] = np.linspace(least, most, count)
    return budgets


def points(
    problem: Problem, allocations: Sequence[Allocation], budgets, sites: Sequence[Site]
) -> dict:
    """The front, JSON-ready, floats to 9 digits: {schema, resources [R], points [M]}.

    `allocations` [M] over the problem's L sites, solved at `budgets` [M,R]; `sites` [L]. A point
    has budgets and predicted by resource (what no choice changes included), objective, bound, gap,
    status (the enum's name in lower case), average_bits (over the weights of `sites`; float counts
    32) and sites {path: [w_bits, a_bits]}. Where the status is not feasible there are no sites,
    the numbers are null, and `nearest` holds the least budget that would do, by resource.
    Raises InputError where the lengths disagree.
    """
    budgets = np.asarray(budgets, np.float64)
    shape = (len(allocations), len(np.asarray(problem.budgets)))
    if budgets.shape != shape:
        raise InputError(f"budgets have shape {budgets.shape}, expected {shape}: [M,R]")
    if len(sites) != len(np.asarray(problem.value)):
        raise InputError(f"{len(sites)} sites for a problem of {len(np.asarray(problem.value))}")
    found = [
        _point(problem, each, own, sites) for each, own in zip(allocations, budgets, strict=True)
    ]
    return {"schema": SCHEMA, "resources": list(names(problem)), "points": found}


def _point(problem: Problem, allocation: Allocation, budgets, sites: Sequence[Site]) -> dict:
    feasible, chosen = allocation.status.feasible, np.asarray(allocation.choice)
    spent = solve.feasible.spent(np.asarray(problem.resources, np.float64), chosen)
    w_bits, a_bits = (
        np.asarray(bits)[chosen].tolist() for bits in (problem.w_bits, problem.a_bits)
    )
    weights = max(sum(site.stored for site in sites), 1)
    average = sum(site.stored * w for site, w in zip(sites, w_bits, strict=True)) / weights
    chosen_bits = zip(sites, w_bits, a_bits, strict=True)
    point = {
        "budgets": _by_name(problem, budgets),
        "predicted": _by_name(problem, spent + np.asarray(problem.fixed)) if feasible else None,
        "objective": _rounded(allocation.objective),
        "bound": _rounded(allocation.bound),
        "gap": _rounded(allocation.gap),
        "status": allocation.status.name.lower(),
        "average_bits": _rounded(average) if feasible else None,
        "sites": {site.path: [w, a] for site, w, a in chosen_bits} if feasible else {},
    }
    if allocation.nearest is not None:
        point["nearest"] = _by_name(problem, np.asarray(allocation.nearest))
    return point


def _by_name(problem: Problem, values) -> dict[str, Any]:
    return dict(zip(names(problem), map(_rounded, values), strict=True))


def _rounded(value) -> float | None:
    """Nine digits; None for what JSON has no number for."""
    return float(f"{value:.9g}") if math.isfinite(value) else None

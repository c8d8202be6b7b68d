"""What a problem allows: validation, spending, the range of budgets, and filling what is left.

Every solver works on one budget row. Sums of measured costs (seconds, joules) round, so a sum
counts as within a budget up to a share of TOLERANCE; byte counts are exact in float64.
Records are read into host float64 here: float64 jax arrays lose precision in arithmetic outside
an x64 scope.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.records import Problem

TOLERANCE = 1e-12


class Row(NamedTuple):
    """The single budget row of a problem, host arrays; `limit` is what the sites may spend."""

    value: np.ndarray  # float64 [L,K]
    cost: np.ndarray  # float64 [L,K]
    legal: np.ndarray  # bool [L,K]
    limit: float


def row(problem: Problem, budget: float | None = None) -> Row:
    """The one row of `problem` under its own budget, or under `budget`."""
    cost = np.asarray(problem.resources, np.float64)[0]
    total = float(np.asarray(problem.budgets)[0]) if budget is None else float(budget)
    fixed = float(np.asarray(problem.fixed, np.float64)[0])
    limit = total - fixed + TOLERANCE * abs(total)
    return Row(np.asarray(problem.value, np.float64), cost, np.asarray(problem.legal, bool), limit)


def spent(cost: np.ndarray, choice: np.ndarray) -> float:
    """sum_l cost[l, choice_l]."""
    return float(np.take_along_axis(cost, np.asarray(choice)[:, None], axis=1).sum())


def cheapest(cost: np.ndarray, legal: np.ndarray) -> np.ndarray:
    """The choice of least cost per site, [L]; the widest of those where costs tie."""
    masked = np.where(legal, cost, np.inf)
    return cost.shape[1] - 1 - np.argmin(masked[:, ::-1], axis=1)


def budget_range(problem: Problem) -> tuple[float, float]:
    """(least, most) that any legal allocation can spend, `fixed` included.

    Ties must be collapsed first (`ties.collapse`). Below the least nothing is feasible; above
    the most the rest of the budget cannot be used.
    """
    _, cost, legal, _ = row(problem)
    fixed = float(np.asarray(problem.fixed, np.float64)[0])
    least = np.where(legal, cost, np.inf).min(axis=1).sum()
    most = np.where(legal, cost, -np.inf).max(axis=1).sum()
    return fixed + float(least), fixed + float(most)


def validate(problem: Problem) -> None:
    """Raises InputError on shapes that disagree, several budget rows, a site without a legal
    choice, and values or costs that are NaN, infinite or (costs) negative at a legal choice."""
    value, legal = np.asarray(problem.value), np.asarray(problem.legal)
    resources = np.asarray(problem.resources)
    sites, choices = value.shape
    shapes = {
        "resources": (resources.shape, (len(resources), sites, choices)),
        "legal": (legal.shape, (sites, choices)),
        "budgets": (np.shape(problem.budgets), (len(resources),)),
        "fixed": (np.shape(problem.fixed), (len(resources),)),
        "w_bits": (np.shape(problem.w_bits), (choices,)),
        "tie": (np.shape(problem.tie), (sites,)),
        "parameters": (np.shape(problem.parameters), (sites,)),
    }
    for name, (got, expected) in shapes.items():
        if got != expected:
            raise InputError(f"problem: {name} has shape {got}, expected {expected}")
    if len(resources) != 1:
        raise InputError(f"{len(resources)} budgets, expected one: keep the one that binds")
    if not sites:
        raise InputError("problem has no sites: nothing to allocate")
    if np.any(np.diff(np.asarray(problem.w_bits)) < 0):
        raise InputError(f"problem: w_bits is {np.asarray(problem.w_bits)}, expected ascending")
    empty = np.flatnonzero(~legal.any(axis=1))
    if len(empty):
        raise InputError(f"no legal choice at sites {empty.tolist()}: relax a pin or a width")
    for name, array in {"value": value, "resources": resources[0]}.items():
        bad = legal & ~np.isfinite(array)
        if bad.any():
            at = np.argwhere(bad)[0].tolist()
            raise InputError(f"problem: {name} is {array[tuple(at)]} at [site, choice] {at}")
    if (legal & (resources[0] < 0)).any() or np.asarray(problem.fixed)[0] < 0:
        raise InputError("problem: negative costs, expected resources and fixed of at least 0")
    if np.isnan(np.asarray(problem.fixed)).any():
        raise InputError("problem: fixed is NaN")


def check_budget(problem: Problem, budget: float) -> None:
    """Raises InputError, stating the minimum, when no legal allocation fits `budget`."""
    if np.isnan(budget):
        raise InputError("the budget is NaN, expected a number")
    least, _ = budget_range(problem)
    if least > budget * (1 + TOLERANCE):
        raise InputError(
            f"budget {budget:.9g} is below the minimum {least:.9g} of any legal allocation: "
            "raise it, allow narrower choices or pin fewer sites"
        )


def fill(problem: Problem, choice: np.ndarray, order: Iterable[int]) -> np.ndarray:
    """Raise sites by one step at a time, in `order`, wherever the step fits; returns [L].

    A site occurs in `order` once for each step it may take. A step goes to the next legal
    choice, and on to the widest that costs no more than that. Blind to `value`, so the controls
    can share it. With every site in `order` at least once, the result is less than one step of
    some site below the budget, or no site has a step left.
    """
    _, cost, legal, limit = row(problem)
    choice = np.array(choice, np.int32)
    total = spent(cost, choice)
    for site in order:
        wider = np.flatnonzero(legal[site])
        wider = wider[wider > choice[site]]
        if len(wider):
            target = wider[cost[site, wider] <= cost[site, wider[0]]][-1]
            step = cost[site, target] - cost[site, choice[site]]
            if total + step <= limit:
                choice[site], total = target, total + step
    return choice


def every_step(problem: Problem, sites: Iterable[int]) -> np.ndarray:
    """`sites` repeated, pass after pass, often enough to take each from its first choice to its
    last: an `order` for `fill` that leaves no step that fits."""
    return np.tile(np.asarray(list(sites), np.int64), np.shape(problem.legal)[1])

"""Greedy: always the raise of greatest saving per cost that fits, from the cheapest choices.

The cost of a raise is the largest share that it takes of what is left of any budget that can
bind. With one budget and on the convex hull this is the order in which the LP spends; once the
next hull step no longer fits, choices between hull vertices are taken too.
"""

import numpy as np

from mpqdiff.records import Allocation, Problem
from mpqdiff.solve.certify import begin, certify
from mpqdiff.solve.feasible import Rows, rows, scarcity
from mpqdiff.solve.lp import COLLINEAR

NOTHING = 1e-30  # of a budget, so that a share of nothing is a number


def _lowered(table: Rows, choice: np.ndarray) -> np.ndarray:
    """Per site the choice of least value among those that cost no more of any resource, [L].

    Ties go to the cheaper choice, then to the narrower.
    """
    now = np.take_along_axis(table.cost, choice[None, :, None], axis=2)
    free = table.legal & (table.cost <= now).all(axis=0)
    value = np.where(free, table.value, np.inf)
    least = value == value.min(axis=1, keepdims=True)
    return np.where(least, scarcity(table.cost, table.legal, table.limit), np.inf).argmin(axis=1)


def choose(problem: Problem) -> np.ndarray:
    """Repeat the best raise until none that lowers the value fits; returns int [L].

    What lowers the value and costs nothing is taken first. Ties go to the earlier site, then to
    the cheaper choice. Every raise lowers the value; with costs that rise with the width there
    are at most L (K - 1) of them, each in O(R L K) operations.
    """
    table = rows(problem)
    legal, sites = table.legal, np.arange(len(table.legal))
    binds = np.where(legal, table.cost, -np.inf).max(axis=2).sum(axis=1) > table.limit
    table = table._replace(cost=table.cost[binds], limit=table.limit[binds])
    choice = _lowered(table, begin(problem))
    if not binds.any():
        return choice
    cost, limit = table.cost, table.limit
    value = table.value / max(np.abs(table.value).max(), NOTHING)
    nothing = NOTHING * np.maximum(cost.max(axis=(1, 2)), NOTHING)
    paid = cost[:, sites, choice]
    rise = cost - paid[..., None]
    saving = np.where(legal, value[sites, choice][:, None] - value, 0.0)
    while True:
        left = np.maximum(limit - paid.sum(axis=1), nothing)
        share = np.maximum((rise / left[:, None, None]).max(axis=0), NOTHING)
        density = np.where((share <= 1) & (saving > 0), saving, 0.0) / share
        best = density.max()
        if best <= 0:
            return choice
        near = density >= best * (1 - COLLINEAR)
        site = int(near.argmax()) // near.shape[1]
        target = int(np.where(near[site], share[site], np.inf).argmin())
        choice[site], paid[:, site] = target, cost[:, site, target]
        rise[:, site] = cost[:, site] - paid[:, site, None]
        saving[site] = np.where(legal[site], value[site, target] - value[site], 0.0)


def solve(problem: Problem) -> Allocation:
    """The record of `choose`."""
    return certify(problem, choose(problem))

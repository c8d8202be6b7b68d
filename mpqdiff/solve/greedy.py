"""Greedy: from the cheapest choices, always the raise of greatest saving per cost that fits.

On the convex hull this is the order in which the LP spends; once the next hull step no longer
fits, choices between hull vertices are taken too.
"""

import numpy as np

from mpqdiff.records import Allocation, Problem
from mpqdiff.solve import lp
from mpqdiff.solve.feasible import row


def solve(problem: Problem) -> Allocation:
    """Repeat the best raise until none that lowers the value fits; ties go to the earlier site,
    then to the cheaper choice. At most L (K - 1) raises."""
    value, cost, legal, limit = row(problem)
    masked = np.where(legal, cost, np.inf)
    least = masked == masked.min(axis=1, keepdims=True)
    choice = np.where(least, np.where(legal, value, np.inf), np.inf).argmin(axis=1)
    sites = np.arange(len(choice))
    total = cost[sites, choice].sum()
    while True:
        rise = cost - cost[sites, choice][:, None]
        saving = value[sites, choice][:, None] - value
        move = legal & (rise > 0) & (saving > 0) & (total + rise <= limit)
        if not move.any():
            return lp.certify(problem, choice)
        density = np.where(move, saving, 0.0) / np.where(move, rise, 1.0)
        near = move & (density >= density.max() * (1 - lp.COLLINEAR))
        site = int(np.argmax(near.any(axis=1)))
        target = np.where(near[site], cost[site], np.inf).argmin()
        total += rise[site, target]
        choice[site] = target

"""The control that knows nothing: one width everywhere, the rest of the budget in depth order."""

import numpy as np

from mpqdiff.records import Allocation, Problem
from mpqdiff.solve import lp
from mpqdiff.solve.feasible import cheapest, fill, row, spent


def at_width(legal: np.ndarray, width: int) -> np.ndarray:
    """Per site the widest legal choice up to index `width`, else the narrowest legal one, [L]."""
    index = np.arange(legal.shape[1])
    below = np.where(legal & (index <= width), index, -1).max(axis=1)
    return np.where(below >= 0, below, legal.argmax(axis=1))


def solve(problem: Problem) -> Allocation:
    """The widest choice that all sites can have, then sites raised by one step, in depth order,
    while they fit. Pinned sites keep their pin."""
    _, cost, legal, limit = row(problem)
    choice = cheapest(cost, legal)
    for width in reversed(range(cost.shape[1])):
        if spent(cost, at_width(legal, width)) <= limit:
            choice = at_width(legal, width)
            break
    return lp.certify(problem, fill(problem, choice, range(len(choice))))

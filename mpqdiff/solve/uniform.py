"""The control that knows nothing: one choice everywhere, the rest of the budgets in depth order."""

import numpy as np

from mpqdiff.records import Allocation, Problem
from mpqdiff.solve.certify import begin, certify
from mpqdiff.solve.feasible import fill, fits, rows


def at_width(legal: np.ndarray, width: int) -> np.ndarray:
    """Per site the widest legal choice up to index `width`, else the narrowest legal one, [L]."""
    index = np.arange(legal.shape[1])
    below = np.where(legal & (index <= width), index, -1).max(axis=1)
    return np.where(below >= 0, below, legal.argmax(axis=1))


def choose(problem: Problem) -> np.ndarray:
    """The widest choice that all sites can have, then sites raised by one step, in depth order,
    while they fit, int32 [L]. Pinned sites keep their pin.

    Where no common choice is within every budget, sites are raised from `certify.begin`.
    """
    table = rows(problem)
    common = (at_width(table.legal, width) for width in reversed(range(table.legal.shape[1])))
    choice = next((each for each in common if fits(table, each)), None)
    return fill(table, begin(problem) if choice is None else choice, range(len(table.legal)))


def solve(problem: Problem) -> Allocation:
    """The record of `choose`."""
    return certify(problem, choose(problem))

"""The control by chance: sites raised in random order until nothing fits."""

import jax
import numpy as np

from mpqdiff.records import Allocation, Problem
from mpqdiff.solve import lp
from mpqdiff.solve.feasible import cheapest, every_step, fill, row


def solve(problem: Problem, *, key: jax.Array) -> Allocation:
    """From the cheapest choices, steps of all sites in an order drawn from `key` (consumed)."""
    _, cost, legal, _ = row(problem)
    steps = every_step(problem, range(len(cost)))
    order = np.asarray(jax.random.permutation(key, len(steps)))
    return lp.certify(problem, fill(problem, cheapest(cost, legal), steps[order]))

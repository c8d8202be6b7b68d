"""The control by chance: sites raised in random order until nothing fits."""

import jax
import numpy as np

from mpqdiff.records import Allocation, Problem
from mpqdiff.solve.certify import begin, certify
from mpqdiff.solve.feasible import every_step, fill, rows


def solve(problem: Problem, *, key: jax.Array) -> Allocation:
    """From the cheapest choices, steps of all sites in an order drawn from `key` (consumed)."""
    table = rows(problem)
    steps = every_step(table, range(len(table.legal)))
    order = np.asarray(jax.random.permutation(key, len(steps)))
    return certify(problem, fill(table, begin(problem), steps[order]))

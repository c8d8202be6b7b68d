"""Which choice wins at each site: solvers of a `Problem`, all of one signature.

A solver takes a valid problem without ties (and keyword arguments of its own) and returns an
`Allocation` within budget; `solve` prepares the one and completes the other.
"""

import numpy as np

from mpqdiff.errors import unknown_name
from mpqdiff.records import Allocation, Problem
from mpqdiff.solve import feasible, greedy, lp, random, size_only, ties, uniform

SOLVERS = {
    "lp": lp.solve,
    "greedy": greedy.solve,
    "uniform": uniform.solve,
    "random": random.solve,
    "size_only": size_only.solve,
}


def solve(problem: Problem, name: str = "lp", **kwargs) -> Allocation:
    """The allocation of solver `name`, choice int32 [L].

    Only "random" takes an argument, `key`. Raises InputError on an unknown solver, an invalid
    problem (`feasible.validate`), tied sites without a common choice, and a budget below the
    minimum. A budget above what can be spent (`budget_range`) is not an error here.
    """
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    feasible.validate(problem)
    collapsed, group = ties.collapse(problem)
    feasible.check_budget(collapsed, float(np.asarray(problem.budgets)[0]))
    return ties.expand(SOLVERS[name](collapsed, **kwargs), group)


def solve_many(problem: Problem, budgets) -> list[Allocation]:
    """The LP at each of `budgets` [M] in one compiled call; errors as `solve`."""
    feasible.validate(problem)
    collapsed, group = ties.collapse(problem)
    return [ties.expand(each, group) for each in lp.solve_many(collapsed, budgets)]


def budget_range(problem: Problem) -> tuple[float, float]:
    """(least, most) that any legal allocation of `problem` can spend; errors as `solve`."""
    feasible.validate(problem)
    return feasible.budget_range(ties.collapse(problem)[0])

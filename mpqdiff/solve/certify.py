"""A choice found by other means, completed by what the LP knows: bound, gap and prices.

And where the other solvers begin: within every budget.
"""

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.records import Allocation, Problem
from mpqdiff.solve import lp
from mpqdiff.solve.feasible import fits, rows, spent, start


def begin(problem: Problem) -> np.ndarray:
    """Choices within the budgets to raise from, int32 [L]: `feasible.start`, else the LP's.

    Raises InputError where neither is within the budgets.
    """
    table = rows(problem)
    choice = start(table)
    if not fits(table, choice):
        answer = lp.solve(problem)
        if not answer.status.feasible:
            raise InputError(f"cannot start: {answer.status.value}")
        choice = np.array(answer.choice, np.int32)
    return choice


def certify(problem: Problem, choice) -> Allocation:
    """The record of `choice`, int [L], within the budgets; the LP's value is its bound.

    OPTIMAL where it reaches the bound (to 1e-9 of it), else ROUNDED.
    """
    table = rows(problem)
    objective = float(spent(table.value, choice))
    value, price = lp.bound(problem)
    bound = min(value, objective)
    return Allocation(
        choice=np.asarray(choice, np.int32),
        objective=objective,
        bound=bound,
        gap=objective - bound,
        status=lp.reached(objective, bound),
        price=price,
    )

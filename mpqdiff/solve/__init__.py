"""Which choice wins at each site: solvers of a `Problem`, all of one signature.

A solver takes a valid problem without ties, which some allocation fits (and keyword arguments of
its own), and returns an `Allocation` within every budget; `solve` prepares the one and completes
the other. Equal merit is decided in favour of the earlier site, then of the cheaper choice.
"""

import inspect

import numpy as np

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.records import Allocation, Problem, Status
from mpqdiff.solve import (
    evolution,
    feasible,
    greedy,
    interior,
    lp,
    random,
    repair,
    size_only,
    threshold,
    ties,
    uniform,
)

SOLVERS = {
    "lp": lp.solve,
    "greedy": greedy.solve,
    "repair": repair.solve,
    "threshold": threshold.solve,
    "evolution": evolution.solve,
    "uniform": uniform.solve,
    "random": random.solve,
    "size_only": size_only.solve,
}


def arguments(name: str) -> dict[str, bool]:
    """The keyword arguments of solver `name`, each with whether it must be given."""
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    taken = list(inspect.signature(SOLVERS[name]).parameters.values())[1:]
    return {each.name: each.default is inspect.Parameter.empty for each in taken}


def solve(problem: Problem, name: str = "lp", **kwargs) -> Allocation:
    """The allocation of solver `name`, choice int32 [L]; kwargs as `arguments(name)` has them.

    Where no allocation fits, the status is INFEASIBLE and `nearest` says what would (one budget:
    the least; several: `interior.solve`), for every solver; UNDECIDED where the relaxation fits
    and nothing else was found. Raises InputError on an unknown solver or argument, an invalid
    problem (`feasible.validate`) and tied sites without a common choice. A budget above what can
    be spent (`budget_range`) is no error here.
    """
    known = arguments(name)
    missing = {each for each, needed in known.items() if needed} - kwargs.keys()
    if missing or kwargs.keys() - known.keys():
        raise InputError(f"solver {name!r} got arguments {sorted(kwargs)}, expected {known}")
    feasible.validate(problem)
    collapsed, group = ties.collapse(problem)
    table = feasible.rows(collapsed)
    if name != "lp" and not feasible.fits(table, feasible.start(table)):
        answer = lp.solve(collapsed)
        if not answer.status.feasible:
            return ties.expand(answer, group)
    return ties.expand(SOLVERS[name](collapsed, **ties.on_groups(kwargs, group)), group)


def solve_many(problem: Problem, budgets) -> list[Allocation]:
    """The LP at each of `budgets`, [M,R] (one resource: also [M]), in one compiled call; what fits
    none is INFEASIBLE, errors as `solve`."""
    feasible.validate(problem)
    array = feasible.check_budgets(problem, budgets)
    collapsed, group = ties.collapse(problem)
    many = lp.solve_many if array.shape[1] == 1 else interior.solve_many
    return [ties.expand(each, group) for each in many(collapsed, array)]


def budget_range(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(least, most) [R] that any legal allocation of `problem` can spend; errors as `solve`."""
    feasible.validate(problem)
    return feasible.budget_range(ties.collapse(problem)[0])


def advice(allocation: Allocation, problem: Problem) -> str:
    """One line for people: the status, and the numbers of each resource under its name."""
    budgets = np.asarray(problem.budgets, np.float64)
    names = problem.names or tuple(f"resource {r}" for r in range(len(budgets)))
    used = feasible.spent(feasible.rows(problem).cost, allocation.choice)
    used = used + np.asarray(problem.fixed, np.float64)
    text = [f"{name} {u:.6g} of {b:.6g}" for name, u, b in zip(names, used, budgets, strict=True)]
    if allocation.status is Status.INFEASIBLE and allocation.nearest is not None:
        near = np.asarray(allocation.nearest)
        rows = zip(names, budgets, near, strict=True)
        text = [f"{name} {b:.6g}, nearest {n:.6g}" for name, b, n in rows]
    elif allocation.status.feasible and allocation.gap > 0:
        text.append(f"gap {allocation.gap:.3g} of {allocation.objective:.6g}")
    return f"{allocation.status.value} ({'; '.join(text)})"

"""Greedy pruning of the full schedule with a protected tail: DiffPro's selector (Algorithm 2).

The paper (arXiv 2511.11446) removes steps of little teacher-student drift until the budget is met.
Two readings, each as a function:

`by_drift` knows one number per step. The step of least drift goes; with `carry` its drift is added
to the step before it, whose eps now serves in its place, so that no long stretch is emptied.

`by_edges` knows what a removal really adds, in closed form: in a list with neighbours p and n of v,
cost(p,n) - cost(p,v) - cost(v,n), of the `edges` of the teacher, or of its student.
"""

from collections.abc import Callable

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.timesteps.candidates import candidates_of, check_count, protected
from mpqdiff.timesteps.drift import check_drift
from mpqdiff.timesteps.edges import edge_costs
from mpqdiff.timesteps.gram import StudentGram


def by_drift(
    alphas_cumprod,
    num_steps: int,
    *,
    drift,
    candidates=None,
    tail: float = 0.1,
    carry: bool = True,
    remeasure: Callable[[np.ndarray], np.ndarray] | None = None,
    every: int = 25,
) -> np.ndarray:
    """`num_steps` timesteps int32 [S], descending, of `candidates` (default the schedule [F]).

    drift [F'] in sampling order (`drift.measure`). `remeasure(timesteps) -> [F']`, where given, is
    called after each `every` removals for the drift of the student on what is left. The first
    step and the tail (`protected`) stay; of equal drifts the noisier step goes first. Raises
    InputError on drift that is not finite or negative, more steps than candidates, and a tail
    that protects more than `num_steps`.
    """
    steps = candidates_of(alphas_cumprod, candidates)
    keep = protected(steps, len(alphas_cumprod), tail)
    check_count(num_steps, keep, tail)
    if every < 1:
        raise InputError(f"every={every}: expected 1 removal or more between measurements")
    mass = check_drift(drift, steps).copy()
    alive = np.ones(len(steps), bool)
    for removed in range(1, len(steps) - num_steps + 1):
        least = np.where(alive & ~keep, mass, np.inf).argmin()
        alive[least] = False
        if carry:
            mass[np.flatnonzero(alive[:least])[-1]] += mass[least]
        if remeasure is not None and removed % every == 0:
            mass = check_drift(remeasure(steps[alive]), steps).copy()
    return steps[alive]


def by_edges(
    alphas_cumprod,
    num_steps: int,
    *,
    gram,
    student: StudentGram | None = None,
    candidates=None,
    tail: float = 0.1,
    data_std: float = 1.0,
    power: int = 1,
) -> np.ndarray:
    """As `by_drift`, by the increase of the edge cost; arguments as in `shortest_path.select`."""
    steps = candidates_of(alphas_cumprod, candidates)
    keep = protected(steps, len(alphas_cumprod), tail)
    check_count(num_steps, keep, tail)
    readings = {"student": student, "candidates": candidates, "data_std": data_std, "power": power}
    costs = edge_costs(gram, alphas_cumprod, **readings)
    return steps[_least_increase(costs, num_steps, keep)]


def _least_increase(costs: np.ndarray, num_steps: int, keep: np.ndarray) -> np.ndarray:
    """Positions [S] left of a list of all, from which the cheapest step not in `keep` goes."""
    length = len(costs)
    before, after = np.arange(-1, length - 1), np.arange(1, length + 1)

    def increase(v):
        p, n = before[v], after[v]
        return costs[p, n - 1] - costs[p, v - 1] - costs[v, n - 1]

    free = np.flatnonzero(~keep)
    rise = np.full(length, np.inf)
    rise[free] = increase(free)
    alive = np.ones(length, bool)
    for _ in range(length - num_steps):
        v = rise.argmin()
        alive[v], rise[v] = False, np.inf
        p, n = before[v], after[v]
        after[p] = n
        if n < length:
            before[n] = p
        for near in (p, n):
            if near < length and not keep[near]:
                rise[near] = increase(near)
    return np.flatnonzero(alive)

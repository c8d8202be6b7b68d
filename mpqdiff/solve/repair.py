"""Repair: the quantile plan of a score, lowered and raised by damage per resource until stable.

DiffPro's allocation (arXiv 2511.11446, Algorithm 1; a reading). From the widest quantile plan
within the budgets, in turn:

    while over a budget   lower the site that loses least damage per resource, by one step
    else                  raise the site that saves most, by one step, whether it fits or not

until a plan within the budgets comes back: what a raise brings is then no more than what lowering
must take. The resource is one number, the largest share that a choice takes of any budget, and
steps go along each site's lower convex hull of it, so that what a step saves per resource falls
from one to the next. With one budget, the stable plan is where the LP walks, up to its last step;
what is left of the budget is then spent by any single raises that fit.
"""

from itertools import pairwise

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.records import Allocation, Problem
from mpqdiff.solve import quantile
from mpqdiff.solve.certify import begin, certify
from mpqdiff.solve.feasible import Rows, fits, rows, spent
from mpqdiff.solve.lp import COLLINEAR

NOTHING = 1e-30


def default_quantiles(choices: int) -> tuple[float, ...]:
    """Quantiles of F from which each of K choices but the first is taken: the widest from 0.75 on,
    the second of three or more from 0.40."""
    return tuple(np.linspace(0.75, 0.40, choices - 1)[::-1].tolist())


def normalised(table: Rows) -> np.ndarray:
    """The largest share of any budget that each choice takes, [L,K]; budgets that cannot bind take
    no part."""
    most = np.where(table.legal, table.cost, 0.0).max(axis=2).sum(axis=1)
    binds = most > table.limit
    if not binds.any():
        return np.zeros_like(table.value)
    limit = np.maximum(table.limit[binds], NOTHING * np.maximum(most[binds], NOTHING))
    return (table.cost[binds] / limit[:, None, None]).max(axis=0)


def hull(resource: np.ndarray, value: np.ndarray, legal: np.ndarray) -> list[list[int]]:
    """The choices on the lower convex hull of each site, the cheapest first; all [L,K].

    Of choices that cost alike the one of least value, of those the narrowest.
    """
    found = []
    for cost, worth, allowed in zip(resource, value, legal, strict=True):
        order = sorted(np.flatnonzero(allowed), key=lambda k: (cost[k], worth[k], k))
        own: list[int] = []
        for k in map(int, order):
            if own and worth[k] >= worth[own[-1]]:
                continue
            while len(own) > 1 and _saving(cost, worth, own[-2], own[-1]) <= _saving(
                cost, worth, own[-1], k
            ):
                own.pop()
            own.append(k)
        found.append(own)
    return found


def _saving(cost, worth, low: int, high: int) -> float:
    """Damage saved per resource from choice `low` to `high`."""
    return (worth[low] - worth[high]) / max(cost[high] - cost[low], NOTHING)


def levels(table: Rows) -> np.ndarray:
    """The choices that some site with more than one can take, int [K']."""
    free = table.legal.sum(axis=1) > 1
    return np.flatnonzero(table.legal[free].any(axis=0))


def seed(table: Rows, score: np.ndarray, quantiles) -> np.ndarray:
    """The widest quantile plan of `score` [L] within every budget, int32 [L]; that of the scarcest
    resource, and the narrowest where none fits. Sites with one legal choice have no place in F,
    and what only they can take is no level."""
    choice = table.legal.argmax(axis=1).astype(np.int32)
    free = np.flatnonzero(table.legal.sum(axis=1) > 1)
    if not len(free):
        return choice
    plans, offered = [], levels(table)
    legal = table.legal[np.ix_(free, offered)]
    for cost, limit in zip(table.cost, table.limit, strict=True):
        left = limit - np.delete(_paid(cost, choice), free).sum()
        least = _paid(cost, choice)[free].sum()
        own = cost[np.ix_(free, offered)]
        found, _ = quantile.seed(score[free], own, legal, max(left, least), quantiles=quantiles)
        plans.append(offered[found])
    choice[free] = np.min(plans, axis=0)
    return choice


def _paid(cost: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """What each site takes of one resource, [L]; cost [L,K]."""
    return np.take_along_axis(cost, choice[:, None], axis=1)[:, 0]


def walk(table: Rows, resource: np.ndarray, choice: np.ndarray) -> np.ndarray | None:
    """The plan of least value that lowering and raising from `choice` meets, int32 [L].

    None where no plan on the way is within the budgets. Ties: the earlier site is raised, the later
    one lowered.
    """
    steps = hull(resource, table.value, table.legal)
    sites, most = np.arange(len(steps)), max(map(len, steps))
    vertex = np.array([own + own[-1:] * (most - len(own)) for own in steps])
    # Saving per resource of the step up from each vertex; none above the last, all below the first.
    density = np.full((len(steps), most + 1), -np.inf)
    density[:, 0] = np.inf
    for row, own in zip(range(len(steps)), steps, strict=True):
        for p, pair in enumerate(pairwise(own)):
            density[row, p + 1] = _saving(resource[row], table.value[row], *pair)
    held = np.take_along_axis(resource, vertex, axis=1) <= _paid(resource, choice)[:, None]
    last = np.array([len(own) - 1 for own in steps])
    place = np.minimum(np.maximum(held.sum(axis=1) - 1, 0), last)
    seen, best, least = set(), None, np.inf
    while True:
        choice = vertex[sites, place]
        while not fits(table, choice):
            down = density[sites, place]
            if down.min() == np.inf:
                return best
            near = down <= down.min() * (1 + COLLINEAR)
            site = len(down) - 1 - int(near[::-1].argmax())
            place[site] -= 1
            choice[site] = vertex[site, place[site]]
        state = hash(choice.tobytes())
        value = spent(table.value, choice)
        if value < least:
            best, least = choice.astype(np.int32), value
        up = density[sites, place + 1]
        if state in seen or up.max() == -np.inf:
            return best
        seen.add(state)
        place[int((up >= up.max() * (1 - COLLINEAR)).argmax())] += 1


def spend(table: Rows, resource: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """`choice` after all single raises that fit, to any legal choice, the best first, int32 [L].

    Ties go to the earlier site, then to the cheaper choice.
    """
    sites = np.arange(len(choice))
    while True:
        own = table.cost[:, sites, choice]
        after = own.sum(axis=1)[:, None, None] + table.cost - own[..., None]
        saving = table.value[sites, choice][:, None] - table.value
        rise = np.maximum(resource - resource[sites, choice][:, None], NOTHING)
        able = table.legal & (saving > 0) & (after <= table.limit[:, None, None]).all(axis=0)
        if not able.any():
            return choice
        density = np.where(able, saving, 0.0) / rise
        near = able & (density >= density.max() * (1 - COLLINEAR))
        site = int(near.any(axis=1).argmax())
        choice[site] = np.where(near[site], rise[site], np.inf).argmin()


def choose(problem: Problem, score=None, quantiles=None) -> np.ndarray:
    """The repaired plan, int32 [L]; arguments as `solve`."""
    table = rows(problem)
    if score is None:
        score = _paid(table.value, table.legal.argmax(axis=1))
    elif np.shape(score) != table.legal.shape[:1]:
        raise InputError(f"score of {np.shape(score)}: expected [{len(table.legal)}]")
    if quantiles is None:
        quantiles = default_quantiles(max(len(levels(table)), 1))
    resource = normalised(table)
    first = seed(table, np.asarray(score, np.float64), quantiles)
    found = walk(table, resource, first)
    return spend(table, resource, begin(problem) if found is None else found)


def solve(problem: Problem, *, score=None, quantiles=None) -> Allocation:
    """The record of `choose`.

    score [L]: what the quantile plan ranks sites by, large for those that need their bits; the
    damage of the narrowest choice where None. quantiles: one less than `levels`, where None
    `default_quantiles`. Raises InputError on another number of either, a score that is not
    finite, and quantiles that do not ascend in [0,1).
    """
    return certify(problem, choose(problem, score, quantiles))

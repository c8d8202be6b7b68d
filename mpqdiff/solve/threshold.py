"""One threshold for all sites: each takes the cheapest choice whose own damage is not above it.

The recipe of Apple's ml-stable-diffusion (mixed-bit palettization: the fewest bits that keep each
layer's own quality), with the threshold found here instead of given: the smallest whose choices
are within every budget. It equalises damage where the LP minimises its sum, and so spends on the
worst sites whatever that costs.
"""

import heapq
from typing import NamedTuple

import numpy as np

from mpqdiff.records import Allocation, Problem
from mpqdiff.solve.certify import begin, certify
from mpqdiff.solve.feasible import Rows, fits, rows, scarcity, spent


class Ladder(NamedTuple):
    """Each site's choices by damage; `choice[l, j]` is the cheapest of the first j + 1."""

    damage: np.ndarray  # float64 [L,K], ascending; inf where the choice is not legal
    choice: np.ndarray  # int64 [L,K]


def ladder(table: Rows) -> Ladder:
    """What each site takes as the threshold rises; of equal costs the less damaging, then the
    narrower choice. Costs of several resources are compared as in `feasible.scarcity`."""
    price = scarcity(table.cost, table.legal, table.limit)
    damage = np.where(table.legal, table.value, np.inf)
    order = np.lexsort((price, damage), axis=1)
    price = np.take_along_axis(price, order, axis=1)
    before = np.minimum.accumulate(price, axis=1)[:, :-1]
    cheaper = np.concatenate([np.ones((len(price), 1), bool), price[:, 1:] < before], axis=1)
    position = np.maximum.accumulate(np.where(cheaper, np.arange(price.shape[1]), 0), axis=1)
    choice = np.take_along_axis(order, position, axis=1)
    return Ladder(np.take_along_axis(damage, order, axis=1), choice)


def at_threshold(steps: Ladder, threshold: float) -> np.ndarray:
    """The choices under `threshold`, int32 [L]; a site with no choice that good takes its best."""
    last = np.maximum((steps.damage <= threshold).sum(axis=1) - 1, 0)
    return np.take_along_axis(steps.choice, last[:, None], axis=1)[:, 0].astype(np.int32)


def lowest(table: Rows) -> float | None:
    """The smallest threshold whose choices are within every budget; None where none is.

    -inf where each site's best choice fits. One sweep over all damages finds it: with several
    budgets a higher threshold may spend more of one, so bisection could pass over the smallest.
    """
    steps = ladder(table)
    if fits(table, at_threshold(steps, -np.inf)):
        return -np.inf
    along = np.take_along_axis(table.cost, steps.choice[None], axis=2)
    damage, change = steps.damage[:, 1:].ravel(), np.diff(along, axis=2).reshape(len(along), -1)
    order = np.argsort(damage, kind="stable")
    total = along[:, :, 0].sum(axis=1)[:, None] + np.cumsum(change[:, order], axis=1)
    # Sums in another order round otherwise: those that are near a limit are summed anew.
    slack = 1e-9 * np.maximum(np.abs(table.limit), np.abs(total).max(axis=1, initial=0.0))
    near = (total <= (table.limit + slack)[:, None]).all(axis=0)
    for threshold in np.unique(damage[order][near & np.isfinite(damage[order])]):
        if fits(table, at_threshold(steps, threshold)):
            return float(threshold)
    return None


def spend(table: Rows, choice: np.ndarray) -> np.ndarray:
    """What is left goes to the most damaged site, again and again, int32 [L].

    It takes the cheapest choice of less damage that fits (of equal costs the least damage, then
    the narrower); a site without one is done. Ties between sites go to the earlier.
    """
    price = scarcity(table.cost, table.legal, table.limit)
    choice, total = np.array(choice, np.int32), spent(table.cost, choice)
    worst = [(-table.value[site, k], site) for site, k in enumerate(choice)]
    heapq.heapify(worst)
    while worst:
        _, site = heapq.heappop(worst)
        value, cost = table.value[site], table.cost[:, site]
        rest = total - cost[:, choice[site]]
        within = (rest[:, None] + cost <= table.limit[:, None]).all(axis=0)
        better = np.flatnonzero(table.legal[site] & within & (value < value[choice[site]]))
        if len(better):
            target = better[np.lexsort((value[better], price[site, better]))[0]]
            choice[site], total = target, rest + cost[:, target]
            heapq.heappush(worst, (-value[target], site))
    return choice


def choose(problem: Problem) -> np.ndarray:
    """The choices under the `lowest` threshold, then `spend`, int32 [L].

    Where no threshold is within every budget, `spend` starts from `certify.begin`.
    """
    table = rows(problem)
    threshold = lowest(table)
    begun = begin(problem) if threshold is None else at_threshold(ladder(table), threshold)
    return spend(table, begun)


def solve(problem: Problem) -> Allocation:
    """The record of `choose`."""
    return certify(problem, choose(problem))

"""Budgets that no allocation fits, and the least ones that it would.

For each resource: the least of it that a choice within the other budgets spends, by the same LP
and rounding, with that resource as the value. Where its bound is above the budget, the budgets
contradict each other; where the choice found fits them all, they do not.
"""

from typing import NamedTuple

import jax
import numpy as np

from mpqdiff.solve import exact, rounding
from mpqdiff.solve.feasible import Rows, spent
from mpqdiff.solve.relaxation import Scaled, relax_many


class Verdict(NamedTuple):
    """What the least-cost problems say of one set of budgets."""

    infeasible: bool  # proven
    choice: np.ndarray | None  # int32 [L] within the budgets, where one was found
    least: np.ndarray  # float64 [R], least spent by a choice within the other limits; see `amount`


def least(table: Rows, budgets, resource: int, node_limit: int) -> exact.Found:
    """The choice that spends least of `resource` within the other limits, by search."""
    limit, size = table.limit.copy(), np.array(budgets, np.float64)
    limit[resource] = size[resource] = np.inf
    alone = Rows(table.cost[resource], table.cost, table.legal, limit)
    return exact.search(alone, size, node_limit=node_limit)


def amount(found: exact.Found) -> float:
    """What `found` of `least` spends; inf where nothing fits the other limits, NaN where the
    search ended without an answer."""
    return np.nan if found.choice is None and not found.complete else found.objective


def judge(table: Rows, scaled: Scaled, limits, budgets, node_limit: int) -> list[Verdict]:
    """A verdict on each of `limits` [M,R] (`budgets` as in `relax_many`)."""
    count, resources = np.shape(limits)
    which = np.tile(np.arange(resources), count)
    lanes = np.repeat(limits, resources, axis=0)
    sizes = np.repeat(budgets, resources, axis=0)
    for array in (lanes, sizes):
        array[np.arange(len(array)), which] = np.inf
    out = relax_many(scaled, lanes, sizes, which=1 + which)
    verdicts = []
    for lane in range(count):
        at = slice(lane * resources, (lane + 1) * resources)
        verdicts.append(_verdict(table._replace(limit=limits[lane]), scaled, budgets[lane],
                                 jax.tree.map(lambda array, at=at: array[at], out),
                                 node_limit))  # fmt: skip
    return verdicts


def _verdict(table: Rows, scaled: Scaled, budgets, out, node_limit: int) -> Verdict:
    resources = len(table.limit)
    nearest, proven = np.full(resources, np.nan), False
    for resource in range(resources):
        choice = out.choice[resource][: scaled.sites]
        unit, base = scaled.value_unit[1 + resource], scaled.value_base[1 + resource]
        bound = base + unit * out.bound[resource]
        used = spent(table.cost, choice)
        others = np.arange(resources) != resource
        if out.fits[resource] and (used <= table.limit)[others].all():
            nearest[resource] = used[resource]
        elif out.cut[resource]:
            choice, nearest[resource], bound = None, np.inf, np.inf
        else:
            found = least(table, budgets, resource, node_limit)
            choice, bound = found.choice, found.bound
            nearest[resource] = amount(found)
        if choice is not None and nearest[resource] <= table.limit[resource]:
            return Verdict(False, choice, nearest)
        proven |= bool(bound == np.inf or bound * (1 - 1e-12) > table.limit[resource])
    return Verdict(proven, None, nearest)


@jax.jit
def _improve(value, cost, limit, choice):
    return rounding.improve(value, cost, limit, choice).choice


def improve(table: Rows, choice: np.ndarray) -> np.ndarray:
    """`choice` [L], which fits, after the changes of single sites that lower the value and fit."""
    value = np.where(table.legal, table.value, rounding.BIG).T
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        cost = np.where(table.legal, table.cost, 0.0).transpose(0, 2, 1)
        better = np.asarray(_improve(value, cost, table.limit, choice.astype(np.int32)))
    fits = (spent(table.cost, better) <= table.limit).all()
    return better if fits else choice

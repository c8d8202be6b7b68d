"""What a problem allows: validation, spending, the range of budgets, and filling what is left.

Sums of measured costs (seconds, joules) round, so a sum counts as within a budget up to a share of
TOLERANCE; byte counts are exact in float64. Records are read into host float64 here: float64 jax
arrays lose precision in arithmetic outside an x64 scope.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.records import Problem

TOLERANCE = 1e-12

ROUNDS = 100  # of weighing the resources anew
CHANGES = 1000  # of single sites


class Rows(NamedTuple):
    """A problem as host arrays; `limit` is what the sites may spend of each resource."""

    value: np.ndarray  # float64 [L,K], 0 where not legal
    cost: np.ndarray  # float64 [R,L,K], 0 where not legal
    legal: np.ndarray  # bool [L,K]
    limit: np.ndarray  # float64 [R]


def rows(problem: Problem, budgets=None) -> Rows:
    """`problem` under its own budgets, or under `budgets` [R]."""
    legal = np.asarray(problem.legal, bool)
    value = np.where(legal, np.asarray(problem.value, np.float64), 0.0)
    cost = np.where(legal, np.asarray(problem.resources, np.float64), 0.0)
    return Rows(
        value, cost, legal, limits(problem, problem.budgets if budgets is None else budgets)
    )


def limits(problem: Problem, budgets) -> np.ndarray:
    """What the sites may spend under `budgets` [...,R]: less what is fixed, and what rounds off."""
    total = np.asarray(budgets, np.float64)
    return total - np.asarray(problem.fixed, np.float64) + TOLERANCE * np.abs(total)


def spent(cost: np.ndarray, choice) -> np.ndarray:
    """sum_l cost[..., l, choice_l] of cost [...,L,K]: one sum per resource, or one number."""
    index = np.broadcast_to(np.asarray(choice)[:, None], (*cost.shape[:-1], 1))
    return np.take_along_axis(cost, index, axis=-1)[..., 0].sum(axis=-1)


def _scale(cost: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """What the costs of each resource are divided by, [R], positive: its limit."""
    most = cost.max(axis=(1, 2))
    nothing = TOLERANCE * np.where(most > 0, most, 1.0)
    return np.where(limit > 0, limit, nothing)


def scarcity(cost: np.ndarray, legal: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Cost of each choice [L,K] in one number, to compare costs of R units; inf if not legal.

    With one resource its cost; with several the sum of the shares of the limits, so that the
    resource that binds hardest weighs most.
    """
    share = cost if len(cost) == 1 else cost / _scale(cost, limit)[:, None, None]
    return np.where(legal, share.sum(axis=0), np.inf)


def cheapest(cost: np.ndarray, legal: np.ndarray) -> np.ndarray:
    """The choice of least cost [L,K] per site, int32 [L]; the widest of those where costs tie."""
    masked = np.where(legal, cost, np.inf)
    return (cost.shape[1] - 1 - np.argmin(masked[:, ::-1], axis=1)).astype(np.int32)


def start(table: Rows) -> np.ndarray:
    """Choices to raise from, int32 [L]: the cheapest, or within the budgets where those are not.

    One resource: the cheapest choices. Several: the least sum of shares of the limits, weighted,
    where round after round the weight of a resource that is exceeded rises and that of others
    falls; where no round fits, single sites of the first are changed, always where it lowers the
    excess most. Where that does not help either, a budget stays exceeded (`fits` tells).
    """
    if len(table.limit) == 1:
        return cheapest(table.cost[0], table.legal)
    share = table.cost / _scale(table.cost, table.limit)[:, None, None]
    weight = np.ones(len(table.limit))
    for step in range(ROUNDS):
        choice = cheapest(np.tensordot(weight, share, axes=1), table.legal)
        if fits(table, choice):
            return choice
        weight *= np.exp(np.clip(spent(share, choice) - 1, -1, 1) / np.sqrt(1 + step))
        weight /= weight.max()
    return _mended(table, share, cheapest(share.sum(axis=0), table.legal))


def _mended(table: Rows, share: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """`choice` after the changes of single sites that lower the summed excess most, [L]."""
    sites = np.arange(len(choice))
    for _ in range(CHANGES):
        if fits(table, choice):
            break
        used = spent(share, choice)
        moved = used[:, None, None] + share - share[:, sites, choice][..., None]
        excess = np.where(table.legal, np.maximum(moved - 1, 0).sum(axis=0), np.inf)
        if not excess.min() < np.maximum(used - 1, 0).sum() * (1 - TOLERANCE):
            break
        site, target = np.unravel_index(np.argmin(excess), excess.shape)
        choice[site] = target
    return choice


def fits(table: Rows, choice) -> bool:
    """Whether `choice` [L] is within every budget."""
    return bool((spent(table.cost, choice) <= table.limit).all())


def budget_range(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(least, most) [R] that legal allocations can spend of each resource alone, `fixed` included.

    Ties must be collapsed first (`ties.collapse`). Below the least nothing is feasible; above
    the most the rest of the budget cannot be used.
    """
    table = rows(problem)
    fixed = np.asarray(problem.fixed, np.float64)
    least = np.where(table.legal, table.cost, np.inf).min(axis=2).sum(axis=1)
    most = np.where(table.legal, table.cost, -np.inf).max(axis=2).sum(axis=1)
    return fixed + least, fixed + most


def validate(problem: Problem) -> None:
    """Raises InputError on shapes that disagree, no budget row, a site without a legal choice,
    and values or costs that are NaN, infinite or (costs) negative at a legal choice."""
    value, legal = np.asarray(problem.value), np.asarray(problem.legal)
    resources = np.asarray(problem.resources)
    if value.ndim != 2 or resources.ndim != 3:
        raise InputError(
            f"problem: value has shape {value.shape} and resources {resources.shape}, expected "
            "[L,K] and [R,L,K]"
        )
    sites, choices = value.shape
    shapes = {
        "resources": (resources.shape, (len(resources), sites, choices)),
        "legal": (legal.shape, (sites, choices)),
        "budgets": (np.shape(problem.budgets), (len(resources),)),
        "fixed": (np.shape(problem.fixed), (len(resources),)),
        "w_bits": (np.shape(problem.w_bits), (choices,)),
        "a_bits": (np.shape(problem.a_bits), (choices,)),
        "tie": (np.shape(problem.tie), (sites,)),
        "parameters": (np.shape(problem.parameters), (sites,)),
    }
    for name, (got, expected) in shapes.items():
        if got != expected:
            raise InputError(f"problem: {name} has shape {got}, expected {expected}")
    if problem.names and len(problem.names) != len(resources):
        raise InputError(f"problem: {len(resources)} resources named {problem.names}")
    if not len(resources):
        raise InputError("problem has no budget: give at least one")
    if not sites:
        raise InputError("problem has no sites: nothing to allocate")
    if np.any(np.diff(np.asarray(problem.w_bits)) < 0):
        raise InputError(f"problem: w_bits is {np.asarray(problem.w_bits)}, expected ascending")
    empty = np.flatnonzero(~legal.any(axis=1))
    if len(empty):
        raise InputError(f"no legal choice at sites {empty.tolist()}: relax a pin or a width")
    for name, array in {"value": value[None], "resources": resources}.items():
        bad = legal & ~np.isfinite(array)
        if bad.any():
            at = np.argwhere(bad)[0].tolist()
            where = at[1:] if name == "value" else at
            order = "[site, choice]" if name == "value" else "[resource, site, choice]"
            raise InputError(f"problem: {name} is {array[tuple(at)]} at {order} {where}")
    fixed = np.asarray(problem.fixed, np.float64)
    if not np.isfinite(fixed).all():
        raise InputError(f"problem: fixed is {fixed}, expected finite numbers")
    if (legal & (resources < 0)).any() or (fixed < 0).any():
        raise InputError("problem: negative costs, expected resources and fixed of at least 0")
    check_budgets(problem, np.asarray(problem.budgets)[None])


def check_budgets(problem: Problem, budgets) -> np.ndarray:
    """`budgets` as float64 [M,R]; where R = 1 also given as [M]. Raises InputError on another
    shape, NaN and -inf; inf is no limit."""
    array = np.asarray(budgets, np.float64)
    count = len(np.asarray(problem.budgets))
    if count == 1 and array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != count or not len(array):
        expected = "[M] or [M,1]" if count == 1 else f"[M,{count}]"
        raise InputError(f"budgets have shape {np.shape(budgets)}, expected {expected}, M >= 1")
    if np.isnan(array).any() or (array == -np.inf).any():
        raise InputError(f"budgets are {array}, expected numbers (inf where there is no limit)")
    return array


def steps(table: Rows) -> np.ndarray:
    """The choice that one step up from each choice leads to, int64 [L,K]; itself at the top.

    A step goes to the next legal choice, and on to the widest that costs no more than that of any
    resource.
    """
    sites, choices = table.legal.shape
    index = np.arange(choices)
    target = np.tile(index, (sites, 1))
    for k in range(choices - 1):
        wider = table.legal & (index > k)
        following = np.where(wider.any(axis=1), wider.argmax(axis=1), k)
        cost = np.take_along_axis(table.cost, following[None, :, None], axis=2)
        same = wider & (table.cost <= cost).all(axis=0)
        target[:, k] = np.where(same, index, following[:, None]).max(axis=1)
    return target


def fill(table: Rows, choice: np.ndarray, order: Iterable[int]) -> np.ndarray:
    """Raise sites by one of `steps` at a time, in `order`, wherever it fits; returns int32 [L].

    A site occurs in `order` once for each step it may take. Blind to `value`, so the controls
    can share it. With every site in `order` at least once, the result is less than one step of
    some site below a budget, or no site has a step left.
    """
    choice, target = np.array(choice, np.int32), steps(table)
    total = spent(table.cost, choice)
    for site in order:
        current, wider = choice[site], target[site, choice[site]]
        if wider != current:
            after = total + (table.cost[:, site, wider] - table.cost[:, site, current])
            if (after <= table.limit).all():
                choice[site], total = wider, after
    return choice


def every_step(table: Rows, sites: Iterable[int]) -> np.ndarray:
    """`sites` repeated, pass after pass, often enough to take each from its first choice to its
    last: an `order` for `fill` that leaves no step that fits."""
    return np.tile(np.asarray(list(sites), np.int64), table.legal.shape[1])

"""The one-budget allocation as a linear program, solved exactly by one sort, then rounded.

    minimise  sum_l sum_k x_lk value_lk   s.t.  sum_l sum_k x_lk cost_lk <= budget,
              sum_k x_lk = 1,  x >= 0,  x_lk = 0 where choice k is not legal

(multiple-choice knapsack; Sinha and Zoltners 1979). Only choices on a site's lower convex hull of
(cost, value) carry weight, and walking the hulls in order of slope is optimal, with one site at
most between two choices. With value linear in bits this is MPQ-Diff's and OMPQ's programme
(arXiv 2412.00144, 2109.07865) in closed form.

Several budgets, and exactness, are `interior`'s.

`relax` is pure jnp: the number of operations traced depends neither on L nor on the number of
budgets. It needs float64, so the functions below it open an x64 scope on the CPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.records import Allocation, Problem, Status
from mpqdiff.solve import interior
from mpqdiff.solve.feasible import Rows, budget_range, cheapest, check_budgets, limits, rows

# Slopes closer than this are one line: its choices all stay steps, so that rounding is finer.
COLLINEAR = 1e-12


class Relaxation(NamedTuple):
    """The LP and its rounding at M budgets."""

    choice: jax.Array  # int32 [M,L], floor of the vertex and density repair
    objective: jax.Array  # float64 [M], value of `choice`
    bound: jax.Array  # float64 [M], value of the LP
    bits: jax.Array  # float64 [M,L], mean bits at the LP vertex
    price: jax.Array  # float64 [M], slope of the first step that is not taken in full


def hull(cost, value, legal):
    """Choices on the lower convex hull of each site, cheapest first, int [L,K].

    cost, value [L,K]; legal bool [L,K]. A shorter hull repeats its last choice. Each step goes
    to the choice of greatest saving per cost, the cheapest where several lie on one line.
    """
    cost = jnp.where(legal, cost, jnp.inf)
    least = cost.min(axis=1, keepdims=True)
    start = jnp.where(cost == least, jnp.where(legal, value, jnp.inf), jnp.inf).argmin(axis=1)

    def step(current, _):
        cost_0 = jnp.take_along_axis(cost, current[:, None], axis=1)
        value_0 = jnp.take_along_axis(value, current[:, None], axis=1)
        better = legal & (cost > cost_0) & (value < value_0)
        rise = jnp.where(better, cost - cost_0, 1.0)
        density = jnp.where(better, value_0 - value, 0.0) / rise
        best = density.max(axis=1, keepdims=True)
        on_line = better & (density >= best * (1 - COLLINEAR))
        nearest = jnp.where(on_line, cost, jnp.inf).argmin(axis=1)
        current = jnp.where(better.any(axis=1), nearest, current)
        return current, current

    _, later = jax.lax.scan(step, start, length=cost.shape[1] - 1)
    return jnp.concatenate([start[:, None], later.T], axis=1)


def relax(value, cost, legal, w_bits, limits) -> Relaxation:
    """Solve and round at each of `limits` [M]; value, cost, legal [L,K], w_bits [K].

    All float64 and finite where legal; every limit at least the cheapest legal total. Ties
    between slopes go to the earlier site.
    """
    sites, choices = cost.shape
    vertex = hull(cost, value, legal)
    at_vertex = [jnp.take_along_axis(a, vertex, axis=1) for a in (cost, value)]
    rise, gain = jnp.diff(at_vertex[0], axis=1), -jnp.diff(at_vertex[1], axis=1)
    slope = jnp.where(rise > 0, gain / jnp.where(rise > 0, rise, 1.0), -1.0)
    # Rounding must not sort a step ahead of the one that it starts from.
    slope = jax.lax.cummin(slope, axis=1)
    order = jnp.argsort(-slope.reshape(-1), stable=True)
    density, rise = slope.reshape(-1)[order], rise.reshape(-1)[order]
    site, step = order // (choices - 1), order % (choices - 1)
    start = at_vertex[0][:, 0].sum()
    before = jnp.cumsum(rise) - rise

    def one(limit):
        taken = jnp.clip((limit - start - before) / jnp.where(rise > 0, rise, 1.0), 0.0, 1.0)
        taken = jnp.where(rise > 0, taken, 0.0)
        price = jnp.where((rise > 0) & (taken < 1), density, 0.0).max(initial=0.0)
        taken = jnp.zeros_like(taken).at[order].set(taken).reshape(sites, choices - 1)
        edge = jnp.ones((sites, 1), cost.dtype)
        # Share of each hull choice: a sum of positive terms, where summing gains would cancel.
        share = jnp.concatenate([edge, taken], 1) - jnp.concatenate([taken, 0 * edge], 1)

        def repair(carry, move):
            level, total = carry
            rise, site, step = move
            fits = (rise > 0) & (level[site] == step) & (total + rise <= limit)
            return (level.at[site].add(fits), total + jnp.where(fits, rise, 0.0)), None

        begin = (jnp.zeros(sites, vertex.dtype), start)
        (level, _), _ = jax.lax.scan(repair, begin, (rise, site, step))
        choice = jnp.take_along_axis(vertex, level[:, None], axis=1)
        objective = jnp.take_along_axis(value, choice, axis=1).sum()
        bound = (share * at_vertex[1]).sum()
        return Relaxation(
            choice=choice[:, 0].astype(jnp.int32),
            objective=objective,
            bound=jnp.minimum(bound, objective),
            bits=(share * w_bits[vertex]).sum(axis=1),
            price=price,
        )

    return jax.vmap(one)(limits)


_relax = jax.jit(relax)


def _least(table: Rows) -> float:
    return float(np.where(table.legal, table.cost[0], np.inf).min(axis=1).sum())


def _run(problem: Problem, budgets: np.ndarray) -> Relaxation:
    """`relax` at `budgets` [M] in float64 on the CPU, whatever the default back end; host arrays.

    A budget below the least is solved as if it were the least.
    """
    table = rows(problem)
    enough = np.maximum(limits(problem, budgets[:, None])[:, 0], _least(table))
    bits = np.asarray(problem.w_bits, np.float64)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        out = _relax(table.value, table.cost[0], table.legal, bits, enough)
        return jax.tree.map(np.asarray, out)


def _infeasible(problem: Problem) -> Allocation:
    table = rows(problem)
    return Allocation(
        choice=cheapest(table.cost[0], table.legal),
        objective=np.inf,
        bound=np.inf,
        gap=np.inf,
        status=Status.INFEASIBLE,
        nearest=budget_range(problem)[0],
    )


def solve_many(problem: Problem, budgets) -> list[Allocation]:
    """One allocation per budget of `budgets` [M] or [M,1], all in one compiled call.

    `problem` has one row, and its own budget plays no part. `bound` is the LP's value, `price`
    its dual and `fractional` its mean bits; OPTIMAL where the rounded choice reaches the bound
    (to 1e-9 of it), else ROUNDED; INFEASIBLE below the least that can be spent.
    """
    budgets = check_budgets(problem, budgets)[:, 0]
    fits = limits(problem, budgets[:, None])[:, 0] >= _least(rows(problem))
    out = _run(problem, budgets)
    return [
        _allocation(*each) if ok else _infeasible(problem)
        for ok, *each in zip(fits, *out, strict=True)
    ]


def _allocation(choice, objective, bound, bits, price) -> Allocation:
    objective, bound = float(objective), float(bound)
    gap = max(objective - bound, 0.0)
    status = reached(objective, bound)
    return Allocation(choice, objective, bound, gap, status, bits, np.asarray(price)[None])


def reached(objective: float, bound: float) -> Status:
    """OPTIMAL where the objective is the bound to 1e-9 of it, else ROUNDED."""
    return Status.OPTIMAL if objective - bound <= 1e-9 * abs(objective) else Status.ROUNDED


def solve(problem: Problem, *, exact: bool = False, node_limit: int = 10_000) -> Allocation:
    """The allocation at the problem's own budgets: `solve_many`, or `interior.solve`.

    The latter has several budgets, and those with one whose rounding leaves a gap that `exact`
    asks to close, within `node_limit` nodes.
    """
    if len(np.asarray(problem.budgets)) > 1:
        return interior.solve(problem, exact=exact, node_limit=node_limit)
    answer = solve_many(problem, np.asarray(problem.budgets))[0]
    if exact and answer.status is Status.ROUNDED:
        return interior.solve(problem, exact=True, node_limit=node_limit)
    return answer


def bound(problem: Problem) -> tuple[float, np.ndarray]:
    """(value, price [R]) of the LP at the problem's own budgets, which it fits."""
    if len(np.asarray(problem.budgets)) > 1:
        return interior.bound(problem)
    out = _run(problem, np.asarray(problem.budgets, np.float64))
    return float(out.bound[0]), np.asarray(out.price)

"""From the end of the central path to an optimal vertex of the allocation LP.

A vertex has one *key* choice per site and R basic variables more: choices beside a site's key, or
slacks of the limits (generalised upper bounding, Dantzig and Van Slyke 1967). So at most R sites
are split. Each choice that the path left with a share is pushed to zero or into the basis, never
raising the value (the primal push of Bixby and Saltzman 1994); then simplex pivots by the least
reduced cost close what gap is left. A push inverts one R x R matrix and touches R + 1 sites.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpqdiff.solve.barrier import reduced_costs

SHARE = 1e-13  # below this a share counts as zero
PIVOT = 1e-9  # smallest rate, relative to the largest, that may leave the basis
FITS = 1e-9  # relative excess over a limit, or share below 0, that counts as rounding
GAP = 1e-12  # relative to the value, at which pivoting stops
PIVOTS = 400


class Vertex(NamedTuple):
    """One choice per site, and R basic variables beside. Slack r is site L + r."""

    key: jax.Array  # int32 [L]
    site: jax.Array  # int32 [R]
    pick: jax.Array  # int32 [R]
    amount: jax.Array  # float64 [R], share of choice `pick` at `site`, or what is left of a limit
    price: jax.Array  # float64 [R], of this basis
    worth: jax.Array  # value of the vertex
    optimal: jax.Array  # bool
    pivots: jax.Array  # int32


class _Basis(NamedTuple):
    key: jax.Array  # int32 [L]
    main: jax.Array  # [L], share of the key choice
    site: jax.Array  # int32 [R]
    pick: jax.Array  # int32 [R]
    amount: jax.Array  # [R]


class _Tables(NamedTuple):
    value: jax.Array  # [K,L]
    cost: jax.Array  # [R,K,L]
    limit: jax.Array  # [R]


def _columns(tables: _Tables, key, site, pick):
    """Costs [R,J] and values [J] of taking `pick` for the key at each `site` [J]."""
    sites, resources = len(key), len(tables.limit)
    slack = site >= sites
    at = jnp.minimum(site, sites - 1)
    cost = tables.cost[:, pick, at] - tables.cost[:, key[at], at]
    unit = (site - sites == jnp.arange(resources)[:, None]).astype(cost.dtype)
    value = tables.value[pick, at] - tables.value[key[at], at]
    return jnp.where(slack, unit, cost), jnp.where(slack, 0.0, value)


def _prices(tables: _Tables, basis: _Basis):
    """The R prices at which every basic variable has reduced cost 0, and the basis inverse."""
    matrix, value = _columns(tables, basis.key, basis.site, basis.pick)
    inverse = jnp.linalg.inv(matrix)
    return -value @ inverse, inverse


def _push(tables: _Tables, basis: _Basis, site, pick, amount) -> _Basis:
    """Move one variable beside the basis down to zero, or up where that lowers the value, until
    it or another variable reaches zero; the basis changes where it is another."""
    sites = len(basis.key)
    price, inverse = _prices(tables, basis)
    column, value = _columns(tables, basis.key, site[None], pick[None])
    reduced = value[0] + price @ column[:, 0]
    sign = jnp.where(reduced < 0, 1.0, -1.0)
    rate = jnp.append(-sign * (inverse @ column[:, 0]), sign)
    where = jnp.append(basis.site, site)
    picks = jnp.append(basis.pick, pick)
    amounts = jnp.append(basis.amount, amount)
    split = where < sites
    same = (where[:, None] == where) & split
    main_rate = -jnp.where(same, rate, 0.0).sum(axis=1)
    main = jnp.where(split, basis.main[jnp.minimum(where, sites - 1)], jnp.inf)
    # Both kinds of variable that can run out, [2 (R + 1)].
    rates = jnp.concatenate([rate, main_rate])
    room = jnp.maximum(jnp.concatenate([amounts, main]), 0.0)
    falling = rates < -PIVOT * jnp.abs(rate).max()
    ratio = jnp.where(falling, room / jnp.where(falling, -rates, 1.0), jnp.inf)
    near = ratio <= ratio.min() * (1 + 1e-9)
    out = jnp.argmax(jnp.where(near, -rates, -jnp.inf))
    step = ratio[out]
    ok = jnp.isfinite(rate).all() & jnp.isfinite(step)
    step = jnp.where(ok, step, 0.0)
    rate, main_rate = jnp.where(ok, rate, 0.0), jnp.where(ok, main_rate, 0.0)
    last = len(rate) - 1
    slot = out % (last + 1)
    by_key = ok & (out > last)
    # Where a key runs out, a basic choice of that site takes its place; without one, this one.
    beside = jnp.argmax(same[slot] & (jnp.arange(last + 1) < last))
    slot = jnp.where(by_key & same[slot][:last].any(), beside, slot)
    amounts = jnp.maximum(amounts + step * rate, 0.0)
    key, left = basis.key, jnp.maximum(main + step * main_rate, 0.0)
    share = basis.main.at[where].set(left, mode="drop")
    hit = jnp.where(by_key, where[slot], sites)
    key = key.at[hit].set(picks[slot], mode="drop")
    share = share.at[hit].set(amounts[slot], mode="drop")
    swap = (jnp.arange(last) == slot) & ok
    return _Basis(
        key=key,
        main=share,
        site=jnp.where(swap, site, basis.site),
        pick=jnp.where(swap, pick, basis.pick),
        amount=jnp.where(swap, amounts[last], amounts[:last]),
    )


def _worth(tables: _Tables, basis: _Basis):
    _, value = _columns(tables, basis.key, basis.site, basis.pick)
    keys = jnp.take_along_axis(tables.value, basis.key[None], axis=0).sum()
    return keys + jnp.where(value == 0, 0.0, basis.amount) @ value


def _dearest(tables: _Tables, basis: _Basis):
    """The nonbasic variable of least reduced cost, (site, pick), and whether it is worth moving."""
    sites = len(basis.key)
    price, _ = _prices(tables, basis)
    reduced = reduced_costs(tables.value, tables.cost, price)
    own = jnp.take_along_axis(reduced, basis.key[None], axis=0)[0]
    least = reduced.min(axis=0) - own
    # The slack of a row that cannot bind is always basic: its price is zero but for rounding.
    short = jnp.where(jnp.isfinite(tables.limit), jnp.minimum(price, 0.0), 0.0)
    gap = -least.sum() - jnp.where(short < 0, short * tables.limit, 0.0).sum()
    site, row = jnp.argmin(least), jnp.argmin(short)
    slack = short[row] < least[site]
    pick = jnp.where(slack, 0, jnp.argmin(reduced[:, site]))
    site = jnp.where(slack, sites + row, site)
    return site.astype(jnp.int32), pick.astype(jnp.int32), gap > GAP * _worth(tables, basis)


def _descend(tables: _Tables, share, basis: _Basis):
    """Push every choice that has a share, site by site; then pivot until value and bound agree.

    Returns (basis, whether they agree, pivots).
    """
    support = (share > SHARE) & (jnp.arange(len(share))[:, None] != basis.key)

    def next_share(basis, left):
        site = jnp.argmax(left > 0).astype(jnp.int32)
        rank = jnp.cumsum(support[:, site].astype(jnp.int32))
        pick = jnp.argmax(rank == left[site]).astype(jnp.int32)
        return site, pick, share[pick, site], jnp.array(True)

    def next_pivot(basis, left):
        site, pick, improves = _dearest(tables, basis)
        return site, pick, jnp.zeros_like(share[0, 0]), improves

    def step(state):
        basis, left, pivots, _ = state
        sharing = (left > 0).any()
        site, pick, amount, go = jax.lax.cond(sharing, next_share, next_pivot, basis, left)
        pushed = _push(tables, basis, site, pick, amount)
        basis = jax.tree.map(lambda old, new: jnp.where(go, new, old), basis, pushed)
        left = left.at[jnp.where(sharing, site, len(left))].add(-1, mode="drop")
        return basis, left, pivots + ~sharing, ~go

    def unfinished(state):
        return ~state[3] & (state[2] < PIVOTS)

    left = support.sum(axis=0, dtype=jnp.int32)
    begin = (basis, left, jnp.int32(0), jnp.array(False))
    basis, _, pivots, optimal = jax.lax.while_loop(unfinished, step, begin)
    return basis, optimal, pivots


def _refine(tables: _Tables, active, basis: _Basis):
    """The basis with the amounts that its choices and the limits imply, free of what shares lost
    on the way, and whether they are feasible."""
    sites, limit = len(basis.key), jnp.where(active, tables.limit, 0.0)
    _, inverse = _prices(tables, basis)
    keys = jnp.take_along_axis(tables.cost, basis.key[None, None], axis=1)[:, 0].sum(axis=1)
    amount = inverse @ (limit - keys)
    split = basis.site < sites
    idle = ~split & ~active[jnp.maximum(basis.site - sites, 0)]
    amount = jnp.where(idle, jnp.inf, amount)
    beside = jnp.where((basis.site[:, None] == basis.site) & split, amount, 0.0).sum(axis=1)
    room = jnp.where(split, 1.0, 1 + jnp.abs(limit[jnp.maximum(basis.site - sites, 0)]))
    feasible = (amount >= -FITS * room).all() & (beside <= 1 + FITS).all()
    return basis._replace(amount=jnp.maximum(amount, 0.0)), feasible


def settle(value, cost, limit, active, share) -> Vertex:
    """An optimal vertex from `share` [K,L], which fits the limits and is near the optimum.

    value [K,L], cost [R,K,L], limit and active [R] as in `barrier.follow`.
    """
    resources, _, sites = cost.shape
    limit = jnp.where(active, limit, jnp.inf)
    tables = _Tables(value, cost, limit)
    share = jnp.where(share > SHARE, share, 0.0)
    share = share / share.sum(axis=0)
    slack = limit - jnp.stack([(share * row).sum() for row in cost])
    start = _Basis(
        key=jnp.argmax(share, axis=0).astype(jnp.int32),
        main=share.max(axis=0),
        site=(sites + jnp.arange(resources)).astype(jnp.int32),
        pick=jnp.zeros(resources, jnp.int32),
        amount=jnp.maximum(slack, 0.0),
    )
    basis, optimal, pivots = _descend(tables, share, start)
    basis, feasible = _refine(tables, active, basis)
    price, _ = _prices(tables, basis)
    return Vertex(
        key=basis.key,
        site=basis.site,
        pick=basis.pick,
        amount=basis.amount,
        price=price,
        worth=_worth(tables, basis),
        optimal=optimal & feasible,
        pivots=pivots,
    )

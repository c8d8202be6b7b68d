"""From a vertex of the relaxation to one choice per site, within every limit.

The vertex splits R sites at most, which leaves 2^R ways to round it. From each, one site at a time:
while a limit is exceeded, the change of least rise in value per excess removed; after that, the
change that lowers the value most among those that fit. The best end is kept; against the nearest
way alone that halves the gap.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.solve.barrier import BIG
from mpqdiff.solve.vertex import Vertex

CAP = 2000  # changes at most
SLACK = 1e-13  # relative excess that a change need not remove: totals are sums, and round


class Rounded(NamedTuple):
    """An integral allocation."""

    choice: jax.Array  # int32 [L]
    total: jax.Array  # float64 [R], spent
    worth: jax.Array  # its value
    fits: jax.Array  # bool


def totals(cost, choice):
    """Spent by each site [R,L] of cost [R,K,L]."""
    return jnp.take_along_axis(cost, choice[None, None], axis=1)[:, 0]


def improve(value, cost, limit, choice) -> Rounded:
    """Repair, then lower, `choice` [L] by changes of one site at a time."""

    def step(state):
        choice, _, count = state
        spent = totals(cost, choice)
        total = spent.sum(axis=1)
        now = jnp.where(total > limit * (1 + SLACK), total - limit, 0.0).sum()
        after = jnp.zeros_like(value)
        for row, own, used, most in zip(cost, spent, total, limit, strict=True):
            after = after + jnp.maximum(row + ((used - most) - own), 0.0)
        rise = value - jnp.take_along_axis(value, choice[None], axis=0)
        less = now - after
        repair = jnp.where(less > 1e-9 * now, rise / jnp.where(less > 0, less, 1.0), BIG)
        lower = jnp.where((after <= 0) & (rise < 0), rise, BIG)
        score = jnp.where(value < BIG, jnp.where(now > 0, repair, lower), BIG)
        best = score.min(axis=0)
        site = jnp.argmin(best)
        found = best[site] < BIG
        pick = jnp.argmin(score[:, site]).astype(choice.dtype)
        choice = choice.at[jnp.where(found, site, len(choice))].set(pick, mode="drop")
        return choice, found, count + 1

    begin = (choice, jnp.array(True), jnp.int32(0))
    choice, _, _ = jax.lax.while_loop(lambda state: state[1] & (state[2] < CAP), step, begin)
    total = totals(cost, choice).sum(axis=1)
    worth = jnp.take_along_axis(value, choice[None], axis=0).sum()
    return Rounded(choice, total, worth, (total <= limit * (1 + SLACK)).all())


def round_off(value, cost, limit, vertex: Vertex) -> Rounded:
    """The best allocation from any corner of `vertex`; arrays as in `barrier.follow`."""
    sites, resources = len(vertex.key), len(limit)
    taken = jnp.asarray(list(itertools.product([False, True], repeat=resources)))
    split = (vertex.site < sites) & (vertex.amount > 0)
    # Two choices of one site cannot both be taken, nor can a slack.
    twice = (vertex.site[:, None] == vertex.site) & ~np.eye(resources, dtype=bool)
    clash = (taken[:, :, None] & taken[:, None] & twice).any(axis=(1, 2))
    possible = ~clash & (split | ~taken).all(axis=1)

    def attempt(best: Rounded, corner) -> tuple[Rounded, None]:
        taken, possible = corner
        hit = jnp.where(taken, vertex.site, sites)
        start = vertex.key.at[hit].set(vertex.pick, mode="drop")
        found = jax.lax.cond(possible, lambda: improve(value, cost, limit, start), lambda: best)
        better = (found.fits & ~best.fits) | (
            (found.fits == best.fits) & (found.worth < best.worth)
        )
        return jax.tree.map(lambda old, new: jnp.where(better, new, old), best, found), None

    total = totals(cost, vertex.key).sum(axis=1)
    none = Rounded(vertex.key, total, jnp.array(jnp.inf), jnp.array(False))
    return jax.lax.scan(attempt, none, (taken, possible))[0]

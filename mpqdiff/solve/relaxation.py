"""The allocation LP with any number of budgets, solved and rounded for many budgets in one call.

    minimise  sum_kl x_kl value_kl   s.t.  sum_kl x_kl cost_rkl <= limit_r,  sum_k x_kl = 1, x >= 0

`relax` follows the central path (`barrier`), moves to a vertex (`vertex`), rounds it (`rounding`)
and bounds the optimum from below: at any prices p >= 0,

    optimum >= sum_l min_k (value_kl + p . cost_kl) - p . limit.

All of it is jnp in float64 on the host CPU; lanes run one after another in one compiled loop (each
stops on its own, and XLA's batched products on the CPU are slower than a loop of plain ones).
Values and costs are taken above each site's least, and scaled by powers of two: both exact for
costs that are whole numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.solve import barrier, rounding, vertex
from mpqdiff.solve.barrier import BIG
from mpqdiff.solve.feasible import TOLERANCE, Rows

LANES = 16  # least number of lanes: one compilation for a single budget and for a search's nodes
TINY = 4 * TOLERANCE  # a limit below this share of its budget leaves a site its cheapest only


class Scaled(NamedTuple):
    """`Rows` as `relax` wants them. Sites are padded to a bucket with sites of one choice."""

    value: np.ndarray  # float64 [1+R,K,L] value, then each cost as a value; BIG where not legal
    cost: np.ndarray  # float64 [R,K,L], 0 where not legal
    value_unit: np.ndarray  # float64 [1+R]
    cost_unit: np.ndarray  # float64 [R]
    value_base: np.ndarray  # float64 [1+R], sum of the least values
    cost_base: np.ndarray  # float64 [R], sum of the least costs
    greatest: np.ndarray  # float64 [1+R], sum of the greatest values, scaled
    sites: int  # L before padding


class Relaxed(NamedTuple):
    """One LP and its rounding, in scaled units; arrays of `relax_many` have M in front."""

    choice: jax.Array  # int32 [L]
    fits: jax.Array  # bool, `choice` is within the limits
    gap: jax.Array  # value of `choice` less the bound; meaningless where it does not fit
    bound: jax.Array
    price: jax.Array  # float64 [R]
    key: jax.Array  # int32 [L], the vertex: see `vertex.Vertex`
    site: jax.Array  # int32 [R]
    pick: jax.Array  # int32 [R]
    amount: jax.Array  # float64 [R]
    cut: jax.Array  # bool, proof that no choice is below the cutoff, and nothing else of use
    solved: jax.Array  # bool, the vertex is optimal
    steps: jax.Array  # int32, evaluations and pivots


def _power(scale) -> np.ndarray:
    scale = np.where(scale > 0, scale, 1.0)
    return np.exp2(np.round(np.log2(scale)))


def _bucket(sites: int) -> int:
    """`sites` rounded up to 8, 64, 96, 128, 192, ...: few sizes, so that few are compiled."""
    if sites <= 64:
        return 8 if sites <= 8 else 64
    octave = 1 << (sites - 1).bit_length()
    return octave if sites > 3 * octave // 4 else 3 * octave // 4


def scale(table: Rows) -> Scaled:
    """Shift, scale, transpose and pad."""
    stack = np.concatenate([table.value[None], table.cost])
    lowest = np.where(table.legal, stack, np.inf).min(axis=2)
    above = np.where(table.legal, stack - lowest[..., None], 0.0)
    spread = above.max(axis=2)
    count = np.maximum((spread > 0).sum(axis=1), 1)
    unit = _power(spread.sum(axis=1) / count)
    above /= unit[:, None, None]
    sites, choices = table.legal.shape
    padded = np.zeros((len(stack), choices, _bucket(sites)))
    padded[:, :, :sites] = above.transpose(0, 2, 1)
    legal = np.zeros((choices, _bucket(sites)), bool)
    legal[0] = True
    legal[:, :sites] = table.legal.T
    return Scaled(
        value=np.where(legal, padded, BIG),
        cost=padded[1:],
        value_unit=unit,
        cost_unit=unit[1:],
        value_base=lowest.sum(axis=1),
        cost_base=lowest[1:].sum(axis=1),
        greatest=above.max(axis=2).sum(axis=1),
        sites=sites,
    )


class _Lane(NamedTuple):
    """One LP after presolve."""

    value: jax.Array  # [K,L], BIG where not legal or `shut`
    cost: jax.Array  # [R,K,L]
    limit: jax.Array  # [R]
    safe: jax.Array  # [R], the limit less a share of TOLERANCE: what rounding aims at
    active: jax.Array  # [R], rows that can bind
    tight: jax.Array  # [R], rows whose limit counts as 0
    shut: jax.Array  # [R,K,L], choices that a tight row excludes
    cutoff: jax.Array


def _presolve(value, cost, limit, least, cutoff) -> _Lane:
    tight = limit <= least
    shut = tight[:, None, None] & (cost > limit[:, None, None])
    value = jnp.where(shut.any(axis=0), BIG, value)
    usable = value < BIG
    most = jnp.stack([jnp.where(usable, row, 0.0).max(axis=0).sum() for row in cost])
    active = (~tight & (limit < most)) | (limit < 0)
    return _Lane(value, cost, limit, limit - least / 8, active, tight, shut, cutoff)


def _dual(lane: _Lane, price):
    """The bound at `price`."""
    spend = jnp.where(price > 0, price * jnp.where(price > 0, lane.limit, 0.0), 0.0)
    return barrier.reduced_costs(lane.value, lane.cost, price).min(axis=0).sum() - spend.sum()


def _best_price(lane: _Lane, at: vertex.Vertex, centre: barrier.Centre):
    """The prices of the vertex or of the path, whichever bound is better."""
    sound = jnp.isfinite(at.price).all()
    price = jnp.where(sound & lane.active, jnp.maximum(at.price, 0.0), 0.0)
    return jnp.where(_dual(lane, price) >= _dual(lane, centre.price), price, centre.price)


def _finish(lane: _Lane, value, centre: barrier.Centre) -> Relaxed:
    """Vertex, rounding and bound; `value` [K,L] is that before presolve."""
    at = vertex.settle(lane.value, lane.cost, lane.limit, lane.active, centre.share)
    rounded = rounding.round_off(lane.value, lane.cost, lane.safe, at)
    price = _best_price(lane, at, centre)
    bound = _dual(lane, price)
    reduced = barrier.reduced_costs(lane.value, lane.cost, price)
    floor = reduced.min(axis=0)
    own = jnp.take_along_axis(reduced, rounded.choice[None], axis=0)[0]
    left = jnp.where(price > 0, lane.limit - rounded.total, 0.0)
    # A tight row is worth what it takes to keep every choice out that it excludes.
    short = floor - barrier.reduced_costs(value, lane.cost, price)
    shadow = jnp.where(lane.shut, short / lane.cost, 0.0).max(axis=(1, 2))
    return Relaxed(
        choice=rounded.choice,
        fits=rounded.fits,
        gap=(own - floor).sum() + price @ left,  # about the choice: no cancellation
        bound=bound,
        price=jnp.where(lane.tight, jnp.maximum(shadow, 0.0), price),
        key=at.key,
        site=at.site,
        pick=at.pick,
        amount=at.amount,
        cut=bound > lane.cutoff,
        solved=at.optimal,
        steps=centre.steps + at.pivots,
    )


def _give_up(lane: _Lane, value, centre: barrier.Centre) -> Relaxed:
    key = jnp.argmin(lane.value, axis=0).astype(jnp.int32)
    none = jnp.zeros(len(lane.limit), jnp.int32)
    return Relaxed(
        choice=key,
        fits=jnp.array(False),
        gap=jnp.array(jnp.inf),
        bound=_dual(lane, centre.price),
        price=centre.price,
        key=key,
        site=none + len(key),
        pick=none,
        amount=jnp.zeros(len(lane.limit)),
        cut=jnp.array(True),
        solved=jnp.array(False),
        steps=centre.steps,
    )


def relax(value, cost, limit, least, cutoff) -> Relaxed:
    """Solve, round and bound one LP.

    value [K,L] of least 0 per site, BIG where not legal; cost [R,K,L] likewise, 0 where not
    legal; limit [R], of which what is below `least` [R] counts as 0. `cut` where the bound
    exceeds `cutoff`.
    """
    lane = _presolve(value, cost, limit, least, cutoff)
    centre = barrier.follow(lane.value, cost, limit, lane.active, cutoff)
    return jax.lax.cond(centre.cut, _give_up, _finish, lane, value, centre)


@jax.jit
def _relax_many(value, cost, which, legal, limit, least, cutoff) -> Relaxed:
    def one(lane):
        which, legal, limit, least, cutoff = lane
        return relax(jnp.where(legal, value[which], BIG), cost, limit, least, cutoff)

    return jax.lax.map(one, (which, legal, limit, least, cutoff))


def relax_many(scaled: Scaled, limits, budgets, *, which=None, legal=None, cutoff=None) -> Relaxed:
    """`relax` at each of `limits` [M,R] (and `budgets` [M,R], their size before what is fixed).

    which [M] picks the objective, 0 for the value and 1 + r for resource r; legal [M,K,L] and
    cutoff [M] (scaled) default to the problem's own and to what no allocation exceeds. Compiled
    once per bucket of (L, M), and per K and R. Arrays of the result are NumPy's, over the padded
    sites.
    """
    count = len(limits)
    lanes = max(LANES, 1 << max(count - 1, 0).bit_length())
    which = np.zeros(count, np.int32) if which is None else np.asarray(which, np.int32)
    if legal is None:
        legal = np.broadcast_to(scaled.value[0] < BIG, (count, *scaled.value.shape[1:]))
    if cutoff is None:
        cutoff = scaled.greatest[which] * (1 + 1e-9) + 1e-9
    budgets = np.asarray(budgets, np.float64)
    limit = (np.asarray(limits, np.float64) - scaled.cost_base) / scaled.cost_unit
    least = np.where(np.isfinite(budgets), TINY * np.abs(budgets), 0.0) / scaled.cost_unit
    spare = lanes - count  # lanes of negative limits, which stop at once

    def pad(array, fill):
        return np.concatenate([array, np.full((spare, *array.shape[1:]), fill, array.dtype)])

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        out = _relax_many(
            scaled.value,
            scaled.cost,
            pad(which, 0),
            pad(legal, True),
            pad(limit, -1.0),
            pad(least, 0.0),
            pad(np.asarray(cutoff, np.float64), 0.0),
        )
        return jax.tree.map(lambda array: np.asarray(array)[:count], out)

"""The central path of the multi-budget allocation LP, under an entropy barrier, in R dimensions.

    minimise  sum_kl x_kl value_kl + t sum_kl x_kl log x_kl
    s.t.      sum_k x_kl = 1,   sum_kl cost_rkl x_kl <= limit_r

At prices p >= 0 and temperature t the shares of a site are in closed form,
x_kl = exp(-(value_kl + p . cost_kl) / t) / sum_k (the same), which eliminates the L one-hot rows.
What is left is a concave function of R prices,

    phi(p) = -t sum_l log sum_k exp(-(value_kl + p . cost_kl) / t) - p . limit,

with gradient sum x cost - limit and, as minus its Hessian, the R x R Schur matrix
sum_l cov_x(cost_r, cost_s) / t: a sum of covariances, formed about the site means, so that nothing
cancels. Newton steps follow its maximum as t falls (tangent predictor, projection on p >= 0,
back-tracking). Every p gives a bound on the LP, so what follows need not trust the path.

A logarithmic barrier (Mehrotra's method) took 20 to 120 iterations where this takes 17 to 45.
Arrays are [K,L], so that reductions over choices run along sites; choices that are not legal have
value BIG. The number of operations traced depends on R alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BIG = 1e30  # value of a choice that is not legal; finite, so that 0 * BIG is 0
CAP = 150  # evaluations at most
FIRST = 0.03  # temperature, in units of the mean spread of a site's values
SHRINK = 0.1  # of the temperature, from one point of the path to the next
CENTRED = 0.1  # squared Newton decrement over t at which a point of the path counts as reached
FEW = 1.0  # sites per resource between choices at which the path ends: the rest is for pivots
PATIENCE = 40  # evaluations after which it ends at the temperature that it has reached
GAP = 1e-7  # the entropy's share of the value at which it ends as well
REACH = 4.0  # how far a step may go, in units of one and the price
COLDEST = 1e-22  # temperature
RESIDUAL = 1e-12  # of the limits, relative, at its end


class Centre(NamedTuple):
    """Where the path ended."""

    price: jax.Array  # float64 [R]
    share: jax.Array  # float64 [K,L], sums to 1 over K
    steps: jax.Array  # int32, evaluations
    converged: jax.Array  # bool
    cut: jax.Array  # bool, the bound exceeds `cutoff`


class _Point(NamedTuple):
    """`phi` at one pair (price, temperature), with what a Newton step needs."""

    phi: jax.Array
    noise: jax.Array  # rounding error of phi
    gradient: jax.Array  # [R]
    schur: jax.Array  # [R,R]
    drift: jax.Array  # [R], derivative of the gradient by the temperature
    heat: jax.Array  # value of the shares above the least reduced costs, over t
    bound: jax.Array
    worth: jax.Array  # value of the shares


class _State(NamedTuple):
    price: jax.Array  # [R], last point accepted
    phi: jax.Array  # there
    slope: jax.Array  # [R], gradient there
    step: jax.Array  # [R], to the point to be tried
    temperature: jax.Array
    fresh: jax.Array  # bool, the temperature has just fallen: `phi` is of another function
    count: jax.Array
    converged: jax.Array
    cut: jax.Array


def reduced_costs(value, cost, price):
    """value + sum_r price_r cost_r, [K,L]."""
    for row, rate in zip(cost, price, strict=True):  # one fused pass, where a product copies
        value = value + rate * row
    return value


def shares(value, cost, price, temperature):
    """Shares [K,L] at `price` [R], reduced costs above each site's least over t [K,L], the least
    [L], and the logs of the sums of exponentials [L]."""
    reduced = reduced_costs(value, cost, price)
    least = reduced.min(axis=0)
    above = (reduced - least) * (1 / temperature)
    weight = jnp.exp(-above)
    total = weight.sum(axis=0)
    return weight * (1 / total), above, least, jnp.log(total)


def _evaluate(value, cost, limit, price, temperature) -> _Point:
    resources = len(limit)
    share, above, least, log_total = shares(value, cost, price, temperature)
    mean = jnp.stack([(share * row).sum(axis=0) for row in cost])
    root = jnp.sqrt(share)
    spread = jnp.concatenate([root * (cost - mean[:, None]), (root * above)[None]])
    spread = spread.reshape(resources + 1, -1)
    moments = spread @ spread.T  # covariances of costs, and of costs with `above`
    heat = (share * above).sum()
    gradient = mean.sum(axis=1) - limit
    bound = least.sum() - price @ limit
    return _Point(
        phi=bound - temperature * log_total.sum(),
        noise=1e-14 * (jnp.abs(least).sum() + jnp.abs(price * limit).sum()),
        gradient=gradient,
        schur=moments[:-1, :-1] / temperature,
        drift=moments[:-1, -1] / temperature,
        heat=heat,
        bound=bound,
        worth=bound + temperature * heat - price @ gradient,
    )


def _solve(schur, free, *columns):
    """schur^-1 column over the `free` rows, 0 in the others, by Cholesky with a unit diagonal."""
    diagonal = jnp.diag(schur)
    usable = free & (diagonal > 0)
    scale = jnp.where(usable, 1 / jnp.sqrt(jnp.where(usable, diagonal, 1.0)), 0.0)
    unit = jnp.where(usable, 1e-13, 1.0)
    factor = jnp.linalg.cholesky(schur * scale[:, None] * scale + jnp.diag(unit))
    right = scale[:, None] * jnp.stack(columns, axis=1)
    out = scale[:, None] * jax.scipy.linalg.cho_solve((factor, True), right)
    return tuple(out[:, i] for i in range(len(columns)))


def follow(value, cost, limit, active, cutoff) -> Centre:
    """The end of the central path of one LP.

    value [K,L] of least 0 per site and mean spread about 1, BIG where not legal; cost [R,K,L] of
    least 0 and mean spread about 1; limit [R], where rows not `active` [R] are left out. Stops
    early, `cut`, at a bound above `cutoff`: above the sum of the greatest values, that says that
    no shares fit the limits.
    """
    limit = jnp.where(active, limit, 0.0)
    size = 1 + limit

    def advance(state: _State) -> _State:
        price = jnp.maximum(state.price + state.step, 0.0)
        at = _evaluate(value, cost, limit, price, state.temperature)
        rise = state.slope @ (price - state.price)
        accepted = state.fresh | (at.phi >= state.phi + 1e-4 * rise - at.noise)
        free = active & ((price > 0) | (at.gradient > 0))
        gradient = jnp.where(free, at.gradient, 0.0)
        # Where every share is near 0 or 1 the Schur matrix is near singular: without the ridge,
        # which vanishes with the gradient, steps have no sensible length or direction.
        ridge = jnp.abs(gradient) / (REACH * (1 + price))
        newton, along = _solve(at.schur + jnp.diag(ridge), free, gradient, at.drift)
        decrement = gradient @ newton
        centred = decrement <= CENTRED * state.temperature
        cold = (
            (at.heat <= FEW * len(limit))
            | (state.temperature * at.heat <= GAP * at.worth)
            | (state.temperature <= COLDEST)
            | (state.count >= PATIENCE)
        )
        settled = jnp.abs(gradient / size).max() <= RESIDUAL
        settled |= decrement <= 1e-9 * at.noise
        cooler = accepted & centred & ~cold
        temperature = jnp.where(cooler, SHRINK, 1.0) * state.temperature
        # A step too long: back to where the slope along it, taken as linear, vanishes.
        before, after = state.slope @ state.step, at.gradient @ state.step
        back = jnp.clip(before / jnp.maximum(before - after, 1e-300), 0.05, 0.5)
        step = newton + (temperature - state.temperature) * along
        cut = at.bound > cutoff
        return _State(
            price=jnp.where(accepted | cut, price, state.price),
            phi=jnp.where(accepted, at.phi, state.phi),
            slope=jnp.where(accepted, at.gradient, state.slope),
            step=jnp.where(accepted, step, back * state.step),
            temperature=temperature,
            fresh=cooler,
            count=state.count + 1,
            converged=accepted & centred & cold & settled,
            cut=cut,
        )

    def unfinished(state: _State):
        return ~state.converged & ~state.cut & (state.count < CAP)

    zero = jnp.zeros_like(limit)
    begin = _State(
        price=jnp.where(active, 0.5, 0.0),
        phi=jnp.array(-jnp.inf),
        slope=zero,
        step=zero,
        temperature=jnp.array(FIRST),
        fresh=jnp.array(True),
        count=jnp.int32(0),
        converged=jnp.array(False),
        cut=(limit < 0).any(),
    )
    end = jax.lax.while_loop(unfinished, advance, begin)
    share, *_ = shares(value, cost, end.price, end.temperature)
    return Centre(end.price, share, end.count, end.converged, end.cut)

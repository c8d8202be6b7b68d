"""Eps error: how far the predicted noise moves when one site is quantised, step by step.

It sees what the network makes of a site, not what the sampler makes of the network: every step
starts from the float model's own x_t. Weighted by `kappa`, steps count by what they add to x_0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.quantize.simulate import Choice, all_float, one_site, simulated_denoise
from mpqdiff.records import Scores
from mpqdiff.sensitivity import damage
from mpqdiff.sites import Site


def score(
    denoise: Denoise,
    net,
    sites: Sequence[Site],
    choices: Sequence[Choice],
    legal,
    x_ts,
    timesteps,
    cond,
    *,
    weights=None,
    chunks=damage.in_memory,
) -> Scores:
    """Damage [T,L,K] = w_t^2 E (eps_q - eps)^2, the mean over samples and elements of eps.

    net: `simulate.supernet` of `choices`; x_ts [T,N,H,W,C] at `timesteps` [T], cond [N]; weights
    w_t [T]: 1, or `kappa` at these timesteps. See `damage` for what is measured, `record.record`
    for `chunks`. Raises InputError on shapes that do not match and damage that is not finite.
    """
    damage.check_inputs(x_ts, timesteps)
    weights = np.ones(len(x_ts)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != np.shape(timesteps) or not np.isfinite(weights).all():
        raise InputError(f"weights are {weights}, expected {len(x_ts)} finite numbers")
    pairs = damage.measured(sites, choices, legal)
    if not pairs:
        empty = np.zeros((len(x_ts), 0))
        return damage.scores("eps_error", empty, pairs, sites, choices, legal)
    quantised = {site for site, _ in pairs}
    simulated = simulated_denoise(denoise, sites, choices, only=quantised)
    x_ts, steps = jnp.asarray(x_ts), jnp.asarray(timesteps, jnp.int32)

    @jax.jit
    def run(net, choice, x_ts, steps, cond):
        params = {**net, "choice": choice}

        def at(row):
            x_t, t = row
            return simulated(params, x_t, t, cond).eps

        return jax.lax.map(at, (x_ts, steps))

    # The same program with every site in float: what nothing reads has damage 0 to the last bit.
    reference = run(net, all_float(sites, choices), x_ts, steps, cond)

    def measure(pair):
        eps = run(net, one_site(sites, choices, *pair), x_ts, steps, cond)
        return damage.mean_squares(eps, reference)

    evaluations = x_ts.shape[0] * x_ts.shape[1]
    found = damage.in_chunks(pairs, measure, chunks, evaluations=evaluations, sites=sites).T
    found = found * weights[:, None] ** 2
    return damage.scores("eps_error", found, pairs, sites, choices, legal)


def kappa(alphas_cumprod, timesteps) -> np.ndarray:
    """What an error of eps at each of the sampler's steps adds to the next x, float64 [S].

    kappa_t = sqrt(abar_s) (sigma_s - sigma_t), sigma = sqrt((1 - abar) / abar), s the step after t
    and abar_s = 1 after the last: DDIM's update is linear in eps with this factor, where it does
    not clip. `timesteps` [S] descending, of the sampler; negative, as sigma falls.
    """
    abar = np.asarray(alphas_cumprod, np.float64)[np.asarray(timesteps)]
    following = np.append(abar[1:], 1.0)
    return np.sqrt(following) * (_sigma(following) - _sigma(abar))


def _sigma(abar):
    return np.sqrt((1.0 - abar) / abar)

"""Rollout error: how far the samples move when one site is quantised for the whole trajectory.

The score closest to what is wanted: it sees what the sampler makes of the network's errors, and
adds up only over sites. The noise is common to all rollouts, so that what moves is the quantising.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from mpqdiff.denoiser import Denoise
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
    sampler: Callable[[Denoise], Callable],
    x_T,
    cond,
    keys=None,
    *,
    steps: int,
    chunks=damage.in_memory,
) -> Scores:
    """Damage [1,L,K] = E (x0_q - x0)^2, the mean over samples and elements.

    net: `simulate.supernet` of `choices`; `sampler(denoise)` gives `(params, x_T, cond, keys) ->
    x_0`, which takes `steps` steps; x_T [N,H,W,C], cond [N] and keys [N] or None are the same in
    every rollout. See `damage` for what is measured, `record.record` for `chunks`. Raises
    InputError on damage that is not finite.
    """
    pairs = damage.measured(sites, choices, legal)
    if not pairs:
        return damage.scores("rollout_error", np.zeros((1, 0)), pairs, sites, choices, legal)
    quantised = {site for site, _ in pairs}
    sample = sampler(simulated_denoise(denoise, sites, choices, only=quantised))

    @jax.jit
    def run(net, choice, x_T, cond, keys):
        return sample({**net, "choice": choice}, x_T, cond, keys)[None]

    # The same program with every site in float: what nothing reads has damage 0 to the last bit.
    reference = run(net, all_float(sites, choices), x_T, cond, keys)

    def measure(pair):
        x_0 = run(net, one_site(sites, choices, *pair), x_T, cond, keys)
        return damage.mean_squares(x_0, reference)

    evaluations = steps * len(x_T)
    found = damage.in_chunks(pairs, measure, chunks, evaluations=evaluations, sites=sites).T
    return damage.scores("rollout_error", found, pairs, sites, choices, legal)

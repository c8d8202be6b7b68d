"""Output error: relative error of a site's own output with only that site quantised.

Every site is fed what the float model feeds it, so that one float pass measures them all. It is
local: it cannot know whether anything reads the output.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff import intercept
from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.quantize.simulate import Choice, site_product, step_rows
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
    chunks=damage.in_memory,
) -> Scores:
    """Damage [T,L,K] = mean((y_q - y)^2) / mean((y - bias)^2) of each site's output y.

    net: `simulate.supernet` of `choices`; x_ts [T,N,H,W,C] at `timesteps` [T], cond [N]. See
    `damage` for what is measured, `record.record` for `chunks`. Raises InputError on shapes that
    do not match, sites that the model never calls and damage that is not finite.
    """
    damage.check_inputs(x_ts, timesteps)
    pairs = damage.measured(sites, choices, legal)
    wanted = {sites[index].path: index for index, _ in pairs}
    product = site_product(sites, choices)

    def errors(params, x_t, t, cond):
        rows = step_rows(params, t)

        def reduce(path, module, kind, args, out):
            if path not in wanted:
                return None
            site = sites[wanted[path]]
            bias = params["sites"].get(path, {}).get("bias", 0.0)
            power = jnp.maximum(jnp.mean((out - bias) ** 2), 1e-30)

            def one(choice):
                y = product(params, rows, site, module, args, choice)
                return jnp.mean((y - out) ** 2) / power

            return jax.lax.map(one, jnp.array([k for index, k in pairs if index == wanted[path]]))

        _, taken = intercept.observe(denoise, reduce)(params["float"], x_t, t, cond)
        missing = sorted(wanted.keys() - taken.keys())
        if missing:
            raise InputError(f"sites never called by this model: {missing}")
        return jnp.concatenate([taken[path] for path in wanted])  # in the order of `pairs`

    steps = np.asarray(timesteps, np.int32)
    if not pairs:
        empty = np.zeros((len(steps), 0))
        return damage.scores("output_error", empty, pairs, sites, choices, legal)
    run = jax.jit(errors)
    found = damage.in_chunks(
        range(len(steps)),
        lambda row: run(net, x_ts[row], steps[row], cond),
        chunks,
        evaluations=(1 + damage.most(pairs)) * x_ts.shape[1],
        sites=sites,
    )
    return damage.scores("output_error", found, pairs, sites, choices, legal)

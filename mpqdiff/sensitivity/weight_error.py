"""Weight error: squared error of a site's weights at each width, blind to what they are fed.

It reads weights alone: it cannot know which sites matter, nor tell activation widths apart.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mpqdiff.errors import InputError
from mpqdiff.quantize.simulate import Choice, widths
from mpqdiff.records import Scores
from mpqdiff.sensitivity import damage
from mpqdiff.sites import Site, module_path


def score(net, sites: Sequence[Site], choices: Sequence[Choice], legal) -> Scores:
    """Damage [1,L,K] = sum over the weights of (scale q - w)^2, from a `simulate.supernet`.

    0 for a product of two activations; see `damage` for what is measured. Raises InputError on
    weights that are not finite.
    """
    w_bits, _ = widths(choices)
    pairs = damage.measured(sites, choices, legal)
    flat = traverse_util.flatten_dict(net["float"], sep="/")
    errors = {}
    for index in {site for site, _ in pairs}:
        site = sites[index]
        if site.parameters:
            kernel = jnp.asarray(flat[f"{module_path(site.path)}/kernel"])
            if not np.isfinite(kernel).all():
                raise InputError(f"weights of site {site.path!r} are not finite: load them again")
            held = net["sites"][site.path]
            errors[index] = np.asarray(_squared_errors(kernel, held["qvalue"], held["scale"]))
    found = [
        errors[site][w_bits.index(choices[k][0])] if site in errors else 0.0 for site, k in pairs
    ]
    return damage.scores("weight_error", [found], pairs, sites, choices, legal)


@jax.jit
def _squared_errors(kernel, qvalue, scale):
    """kernel [...,N] against its integers qvalue [W,K,N] and scale [W,N]: float32 [W]."""
    rows = kernel.reshape(qvalue.shape[1:])

    def one(held):
        q, s = held
        return jnp.sum((q.astype(jnp.float32) * s - rows) ** 2)

    return jax.lax.map(one, (qvalue, scale))

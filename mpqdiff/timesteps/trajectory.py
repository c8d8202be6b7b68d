"""One DDIM step, apart from the network: what a teacher and a student are followed with.

In the coordinates xbar = x_t / sqrt(abar_t), sigma_t = sqrt((1 - abar_t) / abar_t), a DDIM step
(eta 0) is an Euler step, xbar_s = xbar_t + (sigma_s - sigma_t) eps. With eps held, two steps in a
row are therefore one long step: a sampler over a subset of the timesteps is one over all of them
that asks the network only at that subset.
"""

import jax.numpy as jnp

from mpqdiff.denoiser import Denoise
from mpqdiff.diffusion.process import eps_from_x_0, x_0_from_eps


def effective_eps(denoise: Denoise, params, x_t, t, cond, abar_t, *, clip: bool):
    """eps [N,...] that a sampler really uses at x_t [N,...]: that of the clipped x_0 with `clip`.

    The relation of the step to eps is then the same with and without clipping.
    """
    eps = denoise(params, x_t, t, cond).eps
    if not clip:
        return eps
    x_0 = jnp.clip(x_0_from_eps(x_t, 0, eps, abar_t[None]), -1.0, 1.0)
    return eps_from_x_0(x_t, 0, x_0, abar_t[None])


def advance(x_t, eps, abar_t, abar_s):
    """x_s [N,...] of the DDIM step from signal abar_t [] to abar_s [] with `eps` [N,...]."""
    return jnp.sqrt(abar_s) * x_0_from_eps(x_t, 0, eps, abar_t[None]) + jnp.sqrt(1 - abar_s) * eps

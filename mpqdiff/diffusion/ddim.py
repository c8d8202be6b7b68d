"""DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12).

    x_s = sqrt(abar_s) x_0_hat + sqrt(1 - abar_s - sigma^2) eps_hat + sigma z,
    sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s),

where s is the next kept timestep and abar_s = 1 after the last one. With `clip`, x_0_hat is
clipped to [-1, 1] and eps_hat recomputed from it, as guided-diffusion does for pixel models.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.denoiser import Denoise
from mpqdiff.diffusion.process import eps_from_x_0, x_0_from_eps
from mpqdiff.diffusion.steps import check_timesteps, step_noise
from mpqdiff.errors import InputError


def ddim(
    denoise: Denoise,
    params,
    x_T,
    cond,
    *,
    timesteps: np.ndarray,
    alphas_cumprod: np.ndarray,
    keys=None,
    eta: float = 0.0,
    clip: bool = True,
    trajectory: bool = False,
):
    """Sample x_0 [B,H,W,C] from noise x_T over `timesteps` int32 [S], descending.

    The denoiser is called with `t` of shape [] inside one scan over the steps. With
    `trajectory`, returns (x_0, x_ts [S,B,H,W,C]), the inputs of every step. `keys` [B]
    (`step_keys`) are needed, and consumed, only with eta > 0. Raises InputError on timesteps
    that are not strictly descending inside the schedule, on eta outside [0, 1], and on eta > 0
    without keys.
    """
    timesteps = check_timesteps(timesteps, len(alphas_cumprod))
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta={eta}: expected 0 (deterministic) to 1 (as noisy as DDPM)")
    if eta > 0.0 and keys is None:
        raise InputError(f"eta={eta}: a sampler with noise needs a key per image")
    abar = jnp.asarray(alphas_cumprod)[jnp.asarray(timesteps)]
    abar_next = jnp.append(abar[1:], 1.0)

    def step(x_t, at):
        t, abar_t, abar_s, index = at
        eps = denoise(params, x_t, t, cond).eps
        x_0 = x_0_from_eps(x_t, 0, eps, abar_t[None])
        if clip:
            x_0 = jnp.clip(x_0, -1.0, 1.0)
            eps = eps_from_x_0(x_t, 0, x_0, abar_t[None])
        sigma = eta * jnp.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
        towards = 1 - abar_s - sigma**2
        if eta > 0.0:  # over a wide step with eta 1 it is 0, which may be rounded below 0
            towards = jnp.maximum(towards, 0.0)
        x_s = jnp.sqrt(abar_s) * x_0 + jnp.sqrt(towards) * eps
        if eta > 0.0:
            x_s = x_s + sigma * step_noise(keys, index, x_t)
        return x_s, x_t if trajectory else None

    steps = (jnp.asarray(timesteps), abar, abar_next, jnp.arange(len(timesteps)))
    x_0, x_ts = jax.lax.scan(step, x_T, steps)
    return (x_0, x_ts) if trajectory else x_0

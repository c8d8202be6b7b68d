"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

A multistep solver of second order for the same deterministic path as DDIM with eta 0, at the same
one evaluation a step. With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma),
h = lambda_s - lambda_t > 0, h' the h of the step before, and x_0_hat' its prediction:

    x_s = sigma_s / sigma_t x_t - alpha_s (exp(-h) - 1) D,
    D = x_0_hat + h / (2 h') (x_0_hat - x_0_hat')

The first step knows no earlier prediction and the last one, to sigma = 0, has h infinite: both
are of first order (D = x_0_hat, which is DDIM's step), so the last returns the predicted x_0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.denoiser import Denoise
from mpqdiff.diffusion.process import x_0_from_eps
from mpqdiff.diffusion.steps import signals
from mpqdiff.errors import InputError


def multistep(abar_t: np.ndarray, abar_s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sigma_s / sigma_t, -alpha_s (exp(-h) - 1), h / (2 h')) of every step, each [S].

    The third is 0 at the first and the last step.
    """
    log_snr = 0.5 * np.log(abar_t / (1.0 - abar_t))
    h = np.append(np.diff(log_snr), np.inf)
    slope = np.zeros_like(h)
    slope[1:-1] = 0.5 * h[1:-1] / h[:-2]
    return (
        np.sqrt((1.0 - abar_s) / (1.0 - abar_t)),
        -np.sqrt(abar_s) * np.expm1(-h),
        slope,
    )


def dpm_solver(
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

    As `ddim`, but of second order and without noise: `keys` are not used. `clip` bounds x_0_hat
    to [-1, 1]. Raises InputError as `signals` does, and on eta other than 0.
    """
    del keys
    if eta:
        raise InputError(f"eta={eta}: DPM-Solver++(2M) is deterministic; leave eta at 0")
    timesteps, abar_t, abar_s = signals(timesteps, alphas_cumprod)
    abar = jnp.asarray(abar_t, x_T.dtype)
    tables = [jnp.asarray(table, x_T.dtype) for table in multistep(abar_t, abar_s)]

    def step(carry, at):
        x_t, x_0_before = carry
        t, index, shrink, gain, slope = at
        eps = denoise(params, x_t, t, cond).eps
        x_0 = x_0_from_eps(x_t, index, eps, abar)
        if clip:
            x_0 = jnp.clip(x_0, -1.0, 1.0)
        x_s = shrink * x_t + gain * (x_0 + slope * (x_0 - x_0_before))
        return (x_s, x_0), x_t if trajectory else None

    steps = (jnp.asarray(timesteps), jnp.arange(len(timesteps)), *tables)
    (x_0, _), x_ts = jax.lax.scan(step, (x_T, jnp.zeros_like(x_T)), steps)
    return (x_0, x_ts) if trajectory else x_0

"""DDPM's ancestral sampler over any subset of timesteps (Ho et al. 2020, arXiv 2006.11239).

A step t -> s between kept timesteps is one step of the process respaced to them (Nichol & Dhariwal
2021, arXiv 2102.09672, section 4), with beta = 1 - abar_t / abar_s. It draws from the posterior
q(x_s | x_t, x_0) at the predicted x_0 (eqs. 6 and 7 of 2006.11239):

    x_s = sqrt(abar_s) beta / (1 - abar_t) x_0_hat
        + sqrt(1 - beta) (1 - abar_s) / (1 - abar_t) x_t + sqrt(variance) z

The variance is `small`, (1 - abar_s) / (1 - abar_t) beta, right for data of one point; `large`,
beta, right for data from a unit Gaussian; or `learned`, between the two on the log scale as the
network says (eq. 15 of 2102.09672, with its channel v in [-1, 1]):

    log variance = (1 + v) / 2 log large + (1 - v) / 2 log small

The step after the last kept timestep has no noise: it returns the predicted x_0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.denoiser import Denoise
from mpqdiff.diffusion.process import x_0_from_eps
from mpqdiff.diffusion.steps import signals, step_noise
from mpqdiff.errors import InputError, unknown_name

VARIANCES = ("small", "large", "learned")


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) of every step, each [S]: weights in the mean, both log variances.

    After the last step, where the small variance is 0, its logarithm stands at that of 1e-20.
    """

    x_0: np.ndarray
    x_t: np.ndarray
    log_small: np.ndarray
    log_large: np.ndarray


def posterior(abar_t: np.ndarray, abar_s: np.ndarray) -> Posterior:
    """The tables of the steps whose signal goes from abar_t [S] to abar_s [S]."""
    beta = 1.0 - abar_t / abar_s
    kept = (1.0 - abar_s) / (1.0 - abar_t)
    return Posterior(
        x_0=np.sqrt(abar_s) * beta / (1.0 - abar_t),
        x_t=np.sqrt(1.0 - beta) * kept,
        log_small=np.log(np.maximum(kept * beta, 1e-20)),
        log_large=np.log(beta),
    )


def ddpm(
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
    variance: str = "small",
):
    """Sample x_0 [B,H,W,C] from noise x_T over `timesteps` int32 [S], descending.

    As `ddim`, except that it always draws noise: `keys` [B] (`step_keys`) are needed unless S is
    1. `variance` is one of VARIANCES; "learned" reads `Prediction.log_variance` [B,H,W,C], the
    raw v. `clip` bounds x_0_hat to [-1, 1]. Raises InputError as `ddim` and `signals` do, on eta
    other than 0 (DDIM's), on missing keys, and on "learned" with a model that has no variance.
    """
    if variance not in VARIANCES:
        raise unknown_name("variance", variance, VARIANCES)
    if eta:
        raise InputError(f"eta={eta}: DDPM's noise is set by its variance; leave eta at 0")
    timesteps, abar_t, abar_s = signals(timesteps, alphas_cumprod)
    last = len(timesteps) - 1
    if keys is None and last:
        raise InputError("keys=None: DDPM draws noise at every step and needs a key per image")
    abar = jnp.asarray(abar_t, x_T.dtype)
    tables = jax.tree.map(lambda table: jnp.asarray(table, x_T.dtype), posterior(abar_t, abar_s))

    def step(x_t, at):
        t, index, q = at
        out = denoise(params, x_t, t, cond)
        x_0 = x_0_from_eps(x_t, index, out.eps, abar)
        if clip:
            x_0 = jnp.clip(x_0, -1.0, 1.0)
        x_s = q.x_0 * x_0 + q.x_t * x_t
        if last:
            spread = jnp.exp(0.5 * _log_variance(variance, out.log_variance, q))
            x_s = x_s + jnp.where(index < last, spread, 0.0) * step_noise(keys, index, x_t)
        return x_s, x_t if trajectory else None

    steps = (jnp.asarray(timesteps), jnp.arange(last + 1), tables)
    x_0, x_ts = jax.lax.scan(step, x_T, steps)
    return (x_0, x_ts) if trajectory else x_0


def _log_variance(variance: str, v, q: Posterior):
    """log variance of one step: [] where it is fixed, [B,H,W,C] where it is learned."""
    if variance == "small":
        return q.log_small
    if variance == "large":
        return q.log_large
    if v is None:
        raise InputError(
            "variance='learned': the model predicts none (Prediction.log_variance is None); "
            "choose 'small' or 'large'"
        )
    return 0.5 * (1.0 + v) * q.log_large + 0.5 * (1.0 - v) * q.log_small

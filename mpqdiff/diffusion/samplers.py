"""Samplers over an arbitrary descending subset of timesteps, as one scan.

DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12):
    x_s = sqrt(abar_s) x_0_hat + sqrt(1 - abar_s - sigma^2) eps_hat + sigma z,
    sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s),
where s is the next kept timestep and abar_s = 1 after the last one. With `clip`, x_0_hat is
clipped to [-1, 1] and eps_hat recomputed from it, as guided-diffusion does for pixel models.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.denoiser import Denoise
from mpqdiff.diffusion.process import eps_from_x_0, x_0_from_eps
from mpqdiff.errors import InputError


def uniform_timesteps(num_timesteps: int, num_steps: int) -> np.ndarray:
    """`num_steps` timesteps from F-1 down to 0, evenly spaced and rounded: int32 [S].

    Raises InputError unless 1 <= S <= F.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise InputError(
            f"num_steps={num_steps}: expected 1 to {num_timesteps}, the schedule's length"
        )
    if num_steps == 1:
        return np.array([num_timesteps - 1], np.int32)
    return np.rint(np.linspace(num_timesteps - 1, 0, num_steps)).astype(np.int32)


def check_timesteps(timesteps: Sequence[int] | np.ndarray, num_timesteps: int) -> np.ndarray:
    """`timesteps` as int32 [S]; InputError unless strictly descending inside the schedule."""
    steps = np.asarray(timesteps, np.int32)
    if steps.ndim != 1 or not steps.size or np.any(np.diff(steps) >= 0):
        raise InputError(f"timesteps {list(timesteps)}: expected a strictly descending list")
    if steps[0] >= num_timesteps or steps[-1] < 0:
        raise InputError(f"timesteps {list(timesteps)}: expected values in 0..{num_timesteps - 1}")
    return steps


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
        x_s = jnp.sqrt(abar_s) * x_0 + jnp.sqrt(1 - abar_s - sigma**2) * eps
        if eta > 0.0:
            x_s = x_s + sigma * jax.vmap(partial(_step_noise, index, x_t.shape[1:]))(keys)
        return x_s, x_t if trajectory else None

    steps = (jnp.asarray(timesteps), abar, abar_next, jnp.arange(len(timesteps)))
    x_0, x_ts = jax.lax.scan(step, x_T, steps)
    return (x_0, x_ts) if trajectory else x_0


def _step_noise(index, shape, key):
    return jax.random.normal(jax.random.fold_in(key, index), shape)


SAMPLERS = {"ddim": ddim}


def noise_keys(seed: int, start: int, count: int):
    """Keys [count] of images start..start+count-1: functions of (seed, image index) alone.

    Arms with the same seed therefore share noise image by image, whatever their batch size.
    """
    fold = partial(jax.random.fold_in, jax.random.key(seed))
    return jax.vmap(fold)(jnp.arange(start, start + count))


def initial_noise(seed: int, start: int, count: int, image_shape):
    """Noise x_T [count,H,W,C] of images start..start+count-1, from their `noise_keys`."""
    draw = partial(jax.random.normal, shape=tuple(image_shape))
    return jax.vmap(draw)(noise_keys(seed, start, count))


def step_keys(seed: int, start: int, count: int):
    """Keys [count] for the noise of the steps: apart from those that drew x_T."""
    return jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 1))(noise_keys(seed, start, count))

"""Noise schedules (Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672).

A schedule is its cumulative signal `alphas_cumprod` [F], float32, decreasing in `t`; `t = 0` is
the clean end. Products are accumulated in float64: the last entries are about 4e-5.
"""

import numpy as np

from mpqdiff.errors import InputError, unknown_name


def linear(num_timesteps: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Betas from `start` to `end` (scaled by 1000/F): DDPM, ADM and DiT. Returns [F]."""
    scale = 1000.0 / num_timesteps
    betas = np.linspace(scale * start, min(scale * end, 0.999), num_timesteps)
    return np.cumprod(1.0 - betas).astype(np.float32)


def scaled_linear(num_timesteps: int, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """sqrt(beta) linear from sqrt(start) to sqrt(end): latent diffusion, the defaults those of
    Stable Diffusion. Returns [F]."""
    betas = np.linspace(start**0.5, end**0.5, num_timesteps) ** 2
    return np.cumprod(1.0 - betas).astype(np.float32)


def cosine(num_timesteps: int) -> np.ndarray:
    """Squared-cosine signal, betas capped at 0.999 (eq. 17 of 2102.09672). Returns [F]."""
    edge = np.arange(num_timesteps + 1) / num_timesteps
    signal = np.cos((edge + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1.0 - signal[1:] / signal[:-1], 0.999)
    return np.cumprod(1.0 - betas).astype(np.float32)


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine}


def alphas_cumprod(name: str, num_timesteps: int, betas=()) -> np.ndarray:
    """The schedule called `name` over `num_timesteps` steps: float32 [F].

    `betas`: (first, last) instead of the schedule's own. Raises InputError for an unknown name,
    fewer than one step, or betas that are no increasing pair in (0, 1) or not taken by `cosine`.
    """
    if name not in SCHEDULES:
        raise unknown_name("noise schedule", name, SCHEDULES)
    if num_timesteps < 1:
        raise InputError(f"num_timesteps={num_timesteps}: a schedule needs at least 1 step")
    betas = tuple(betas)
    if betas and (name == "cosine" or len(betas) != 2 or not 0 < betas[0] < betas[1] < 1):
        raise InputError(
            f"betas={betas} of schedule {name!r}: expected (first, last), 0 < first < last < 1, "
            "and none for cosine"
        )
    return SCHEDULES[name](num_timesteps, *betas)

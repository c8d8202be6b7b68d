"""Noise schedules (Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672).

A schedule is its cumulative signal `alphas_cumprod` [F], float32, decreasing in `t`; `t = 0` is
the clean end. Products are accumulated in float64: the last entries are about 4e-5.
"""

import numpy as np

from mpqdiff.errors import InputError, unknown_name


def linear(num_timesteps: int) -> np.ndarray:
    """Betas from 1e-4 to 0.02 (scaled by 1000/F), the DDPM and DiT default. Returns [F]."""
    scale = 1000.0 / num_timesteps
    betas = np.linspace(scale * 1e-4, min(scale * 0.02, 0.999), num_timesteps)
    return np.cumprod(1.0 - betas).astype(np.float32)


def scaled_linear(num_timesteps: int) -> np.ndarray:
    """sqrt(beta) linear from sqrt(8.5e-4) to sqrt(0.012): latent diffusion. Returns [F]."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, num_timesteps) ** 2
    return np.cumprod(1.0 - betas).astype(np.float32)


def cosine(num_timesteps: int) -> np.ndarray:
    """Squared-cosine signal, betas capped at 0.999 (eq. 17 of 2102.09672). Returns [F]."""
    edge = np.arange(num_timesteps + 1) / num_timesteps
    signal = np.cos((edge + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1.0 - signal[1:] / signal[:-1], 0.999)
    return np.cumprod(1.0 - betas).astype(np.float32)


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine}


def alphas_cumprod(name: str, num_timesteps: int) -> np.ndarray:
    """The schedule called `name` over `num_timesteps` steps: float32 [F].

    Raises InputError for an unknown name or fewer than one step.
    """
    if name not in SCHEDULES:
        raise unknown_name("noise schedule", name, SCHEDULES)
    if num_timesteps < 1:
        raise InputError(f"num_timesteps={num_timesteps}: a schedule needs at least 1 step")
    return SCHEDULES[name](num_timesteps)

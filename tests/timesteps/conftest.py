"""A diffusion with an exact denoiser: a mixture of Gaussians, and trajectories made up."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.schedule import alphas_cumprod

DIMENSIONS, COMPONENTS, SPREAD = 8, 6, 0.2


@lru_cache  # the same function, so that what is compiled for it is used again
def mixture(length: int):
    """(denoise, alphas_cumprod [F]) of 6 Gaussians of std 0.2 in 8 dimensions, as [N,1,1,8]."""
    centres = jnp.asarray(np.random.default_rng(3).normal(size=(COMPONENTS, DIMENSIONS)))
    abar = alphas_cumprod("linear", length)
    table = jnp.asarray(abar)

    def denoise(params, x_t, t, cond) -> Prediction:
        signal = table[t]
        x = x_t.reshape(len(x_t), 1, DIMENSIONS)
        off = x - jnp.sqrt(signal) * centres
        variance = signal * SPREAD**2 + 1.0 - signal
        share = jax.nn.softmax(-(off**2).sum(-1) / (2 * variance), axis=1)
        eps = jnp.sqrt(1.0 - signal) * (share[..., None] * off).sum(1) / variance
        return Prediction(params * eps.reshape(x_t.shape), jnp.zeros_like(x_t))

    return denoise, abar


@pytest.fixture(scope="session")
def make_mixture():
    """`mixture`, as a fixture: test folders are not importable."""
    return mixture


@pytest.fixture(scope="session")
def wandering_gram():
    """`(seed, length, elements=40) -> (Gram [F,F], eps [F,elements])` of eps that wanders."""

    def gram(seed: int, length: int, elements: int = 40):
        rng = np.random.default_rng(seed)
        moves = rng.normal(size=(length, elements)) * rng.exponential(size=(length, 1))
        eps = rng.normal(size=elements) + 0.1 * np.cumsum(moves, axis=0)
        return eps @ eps.T / elements, eps

    return gram

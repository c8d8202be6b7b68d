"""Embeddings of the timestep, in the variants that trained networks differ by."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np


def sinusoid(t, width: int, *, cos_first: bool = True, frequency_shift: float = 0.0):
    """t [B] -> [B, width], float32: frequencies 10000^(-i / (width/2 - frequency_shift)).

    ADM, latent diffusion and facebookresearch/DiT: cosines first, shift 0. DDPM: sines first,
    shift 1, so that the last frequency is exactly 1/10000.
    """
    half = width // 2
    exponents = np.arange(half) / (half - frequency_shift)
    frequencies = np.exp(-np.log(10000.0) * exponents).astype(np.float32)
    angles = t[:, None].astype(jnp.float32) * frequencies
    halves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(halves[::-1] if cos_first else halves, axis=-1)


class TimeEmbedding(nn.Module):
    """Sinusoid of t [B] (in float32, then cast to `dtype`), Dense, SiLU, Dense: [B, width]."""

    width: int
    sinusoid_width: int
    cos_first: bool
    frequency_shift: float
    dtype: Any

    @nn.compact
    def __call__(self, t):
        waves = sinusoid(
            t,
            self.sinusoid_width,
            cos_first=self.cos_first,
            frequency_shift=self.frequency_shift,
        )
        hidden = nn.silu(nn.Dense(self.width, name="fc1")(waves.astype(self.dtype)))
        return nn.Dense(self.width, name="fc2")(hidden)

"""Diffusion transformer with adaLN-Zero (Peebles & Xie 2022, arXiv 2212.09748), plain Flax linen.

No line here knows of quantisation: bits enter through `mpqdiff.intercept`. Attention products are
modules (`Product`) so that they, too, can be observed by path. Layer order, zero initialisation
and the (shift, scale, gate) order follow facebookresearch/DiT.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mpqdiff.denoiser import Prediction
from mpqdiff.models.product import Product

# Table 1 of the paper; the patch size is chosen apart ("DiT-XL/2" is size XL, patch 2).
DIT_SIZES = {
    "S": {"depth": 12, "width": 384, "num_heads": 6},
    "B": {"depth": 12, "width": 768, "num_heads": 12},
    "L": {"depth": 24, "width": 1024, "num_heads": 16},
    "XL": {"depth": 28, "width": 1152, "num_heads": 16},
}


def sincos_1d(positions: np.ndarray, width: int) -> np.ndarray:
    """[len(positions), width]: sines then cosines at frequencies 10000^(-2i/width)."""
    omega = 1.0 / 10000 ** (np.arange(width // 2) / (width / 2.0))
    angles = np.outer(positions, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(grid: int, width: int, interpolation: float = 1.0) -> np.ndarray:
    """Fixed position table [grid * grid, width], float32: half the features code the column.

    Positions are indices over `interpolation` (PixArt: larger grids keep the range of smaller).
    """
    places = np.arange(grid) / interpolation
    rows, columns = np.meshgrid(places, places, indexing="ij")
    halves = [sincos_1d(axis.reshape(-1), width // 2) for axis in (columns, rows)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def timestep_sinusoid(t, width: int, freq_shift: int = 0):
    """t [B] -> [B, width], float32: cosines then sines, frequencies 10000^(-i/(width/2 - shift)).

    facebookresearch/DiT divides by width/2 (shift 0), diffusers' DiT by one less (shift 1).
    """
    half = width // 2
    exponents = -np.log(10000.0) * np.arange(half) / (half - freq_shift)
    frequencies = np.exp(exponents).astype(np.float32)
    angles = t[:, None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoid of t (computed in float32, then cast to `dtype`), Dense, SiLU, Dense."""

    width: int
    dtype: Any
    frequency_width: int = 256
    freq_shift: int = 0

    @nn.compact
    def __call__(self, t):
        x = timestep_sinusoid(t, self.frequency_width, self.freq_shift).astype(self.dtype)
        x = nn.silu(nn.Dense(self.width, kernel_init=nn.initializers.normal(0.02), name="fc1")(x))
        return nn.Dense(self.width, kernel_init=nn.initializers.normal(0.02), name="fc2")(x)


class Attention(nn.Module):
    """Multi-head self-attention with one fused (q, k, v) projection."""

    num_heads: int

    @nn.compact
    def __call__(self, x):
        batch, tokens, width = x.shape
        head = width // self.num_heads
        qkv = nn.Dense(3 * width, kernel_init=nn.initializers.xavier_uniform(), name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.num_heads, head), 2, 0)
        scores = Product("bphd,bqhd->bhpq", name="qk")(q * head**-0.5, k)
        mixed = Product("bhpq,bqhd->bphd", name="pv")(nn.softmax(scores), v)
        mixed = mixed.reshape(batch, tokens, width)
        return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform(), name="proj")(mixed)


class Mlp(nn.Module):
    """Dense, GELU (tanh), Dense."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.xavier_uniform()
        h = nn.gelu(nn.Dense(self.hidden, kernel_init=init, name="fc1")(x), approximate=True)
        return nn.Dense(x.shape[-1], kernel_init=init, name="fc2")(h)


def modulate(x, shift, scale):
    """x [B,P,D], shift and scale [B,D]: x (1 + scale) + shift."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


def plain_norm(x, epsilon: float = 1e-6):
    """LayerNorm without parameters."""
    return nn.LayerNorm(epsilon=epsilon, use_bias=False, use_scale=False)(x)


def to_prediction(x, grid: int, patch: int, learn_variance: bool) -> Prediction:
    """Token outputs [B, grid * grid, patch * patch * C] as images; with `learn_variance` the second
    half of the channels is the raw variance."""
    x = x.reshape(x.shape[0], grid, grid, patch, patch, -1)
    x = jnp.einsum("bhwpqc->bhpwqc", x).reshape(x.shape[0], grid * patch, grid * patch, -1)
    return Prediction(*jnp.split(x, 2, axis=-1)) if learn_variance else Prediction(x)


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning vector c [B, D]."""

    num_heads: int
    mlp_ratio: float
    mlp_norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x, c):
        width = x.shape[-1]
        modulation = nn.Dense(6 * width, kernel_init=nn.initializers.zeros, name="adaln")
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(
            modulation(nn.silu(c)), 6, axis=-1
        )
        attention = Attention(self.num_heads, name="attn")
        x = x + gate_a[:, None] * attention(modulate(plain_norm(x), shift_a, scale_a))
        mlp = Mlp(int(width * self.mlp_ratio), name="mlp")
        normed = plain_norm(x, self.mlp_norm_epsilon)
        return x + gate_m[:, None] * mlp(modulate(normed, shift_m, scale_m))


class DiT(nn.Module):
    """eps prediction for images [B,H,W,C]; class `num_classes` is the null class for guidance.

    With `learn_variance` the last layer gives 2C channels and `Prediction.log_variance` holds the
    raw second half (the interpolation coefficient of Nichol & Dhariwal 2021, eq. 15).
    `timestep_freq_shift=1` and `mlp_norm_epsilon=1e-5` compute what diffusers' DiT computes.
    """

    image_size: int
    channels: int
    patch: int
    width: int
    depth: int
    num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    learn_variance: bool = False
    timestep_freq_shift: int = 0
    mlp_norm_epsilon: float = 1e-6

    @nn.nowrap
    def example_inputs(self):
        """(x_t, t, label) of one image, zeros: enough to make the parameters."""
        row = jnp.zeros((1,), jnp.int32)
        return jnp.zeros((1, self.image_size, self.image_size, self.channels)), row, row

    @nn.compact
    def __call__(self, x_t, t, label) -> Prediction:
        batch = x_t.shape[0]
        grid = self.image_size // self.patch
        out_channels = self.channels * (2 if self.learn_variance else 1)
        patches = (self.patch, self.patch)
        embed = nn.Conv(
            self.width,
            patches,
            strides=patches,
            padding="VALID",
            kernel_init=nn.initializers.xavier_uniform(),
            name="patch_embed",
        )
        x = embed(x_t).reshape(batch, grid * grid, self.width)
        # A float32 table would lift a bfloat16 network to float32 from here on.
        x = x + sincos_2d(grid, self.width).astype(x.dtype)
        # One row suffices when the whole batch shares its timestep (t of shape []).
        embed_t = TimestepEmbedder(
            self.width, dtype=x.dtype, freq_shift=self.timestep_freq_shift, name="t_embed"
        )
        c = embed_t(jnp.atleast_1d(t))
        c = c + nn.Embed(
            self.num_classes + 1,
            self.width,
            embedding_init=nn.initializers.normal(0.02),
            name="label_embed",
        )(label)
        for index in range(self.depth):
            block = Block(
                self.num_heads, self.mlp_ratio, self.mlp_norm_epsilon, name=f"block_{index}"
            )
            x = block(x, c)
        zeros = nn.initializers.zeros
        shift, scale = jnp.split(
            nn.Dense(2 * self.width, kernel_init=zeros, name="final_adaln")(nn.silu(c)), 2, axis=-1
        )
        x = modulate(plain_norm(x), shift, scale)
        x = nn.Dense(self.patch**2 * out_channels, kernel_init=zeros, name="final")(x)
        return to_prediction(x, grid, self.patch, self.learn_variance)

"""PixArt transformer (Chen et al. 2023, arXiv 2310.00426; Sigma: 2403.04692), plain Flax linen.

A DiT whose blocks attend to a caption and share one modulation (adaLN-single): one Dense makes the
six (shift, scale, gate) vectors of all blocks from t, each block adds a table of its own. Text
enters as embeddings computed beforehand. Layer order follows diffusers' PixArtTransformer2DModel.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from mpqdiff.denoiser import Prediction
from mpqdiff.errors import InputError
from mpqdiff.models.dit import (
    Attention,
    Mlp,
    TimestepEmbedder,
    plain_norm,
    sincos_2d,
    to_prediction,
)
from mpqdiff.models.product import Product

XAVIER, ZEROS = nn.initializers.xavier_uniform(), nn.initializers.zeros
MASKED = -10000.0  # added to the score of a padding token, as diffusers does


class Caption(NamedTuple):
    """What PixArt is conditioned on. `embeddings` [B, S, text_width] of S text tokens; `mask`
    [B, S], 1 where there is text, or None; `resolution` [B, 2] (height, width in pixels) and
    `aspect_ratio` [B, 1] for models with `size_conditions`."""

    embeddings: Any
    mask: Any = None
    resolution: Any = None
    aspect_ratio: Any = None


class CaptionProjection(nn.Module):
    """Dense, GELU (tanh), Dense, from the text encoder's width to the transformer's."""

    width: int

    @nn.compact
    def __call__(self, text):
        h = nn.gelu(nn.Dense(self.width, kernel_init=XAVIER, name="fc1")(text), approximate=True)
        return nn.Dense(self.width, kernel_init=XAVIER, name="fc2")(h)


class CrossAttention(nn.Module):
    """Image tokens [B,P,D] attend to text tokens [B,S,D]; one fused (k, v) projection."""

    num_heads: int

    @nn.compact
    def __call__(self, x, text, mask):
        batch, tokens, width = x.shape
        head = width // self.num_heads
        q = nn.Dense(width, kernel_init=XAVIER, name="q")(x)
        kv = nn.Dense(2 * width, kernel_init=XAVIER, name="kv")(text)
        q = q.reshape(batch, tokens, self.num_heads, head) * head**-0.5
        k, v = jnp.moveaxis(kv.reshape(batch, -1, 2, self.num_heads, head), 2, 0)
        scores = Product("bphd,bqhd->bhpq", name="qk")(q, k)
        if mask is not None:
            scores = scores + (1 - mask.astype(scores.dtype))[:, None, None] * MASKED
        mixed = Product("bhpq,bqhd->bphd", name="pv")(nn.softmax(scores), v)
        mixed = mixed.reshape(batch, tokens, width)
        return nn.Dense(width, kernel_init=ZEROS, name="proj")(mixed)


def _modulate(x, shift, scale):
    return x * (1.0 + scale) + shift


class Block(nn.Module):
    """Self-attention, attention to the text, MLP; `modulation` [B or 1, 6, D] is all blocks'."""

    num_heads: int
    mlp_ratio: float
    norm_epsilon: float

    @nn.compact
    def __call__(self, x, text, mask, modulation):
        width = x.shape[-1]
        table = self.param("table", nn.initializers.normal(width**-0.5), (6, width))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(
            table.astype(x.dtype) + modulation, 6, axis=1
        )
        attention = Attention(self.num_heads, name="attn")
        x = x + gate_a * attention(_modulate(plain_norm(x, self.norm_epsilon), shift_a, scale_a))
        x = x + CrossAttention(self.num_heads, name="cross")(x, text, mask)
        mlp = Mlp(int(width * self.mlp_ratio), name="mlp")
        return x + gate_m * mlp(_modulate(plain_norm(x, self.norm_epsilon), shift_m, scale_m))


class PixArt(nn.Module):
    """eps prediction for latents [B,H,W,C] given a `Caption`, or its embeddings alone.

    `interpolation` divides the positions (2 for 1024 pixels of the Alpha weights, 1 for 512 and
    below); `size_conditions`: the resolution and aspect ratio join the timestep (Alpha, 1024).
    """

    image_size: int
    channels: int
    patch: int
    width: int
    depth: int
    num_heads: int
    text_width: int
    mlp_ratio: float = 4.0
    learn_variance: bool = True
    interpolation: float = 1.0
    size_conditions: bool = False
    norm_epsilon: float = 1e-6

    @nn.nowrap
    def check(self) -> None:
        """InputError on sizes that do not divide."""
        parts = 12 if self.size_conditions else 4  # thirds carry the sizes, quarters the positions
        if self.image_size % self.patch or self.width % self.num_heads or self.width % parts:
            raise InputError(
                f"pixart: image_size={self.image_size} must be a multiple of patch={self.patch} "
                f"and width={self.width} of num_heads={self.num_heads} and of {parts}"
            )

    @nn.nowrap
    def example_inputs(self):
        """(x_t, t, Caption) of one image with two text tokens, zeros."""
        x_t = jnp.zeros((1, self.image_size, self.image_size, self.channels))
        sizes = (jnp.ones((1, 2)), jnp.ones((1, 1))) if self.size_conditions else (None, None)
        caption = Caption(jnp.zeros((1, 2, self.text_width)), jnp.ones((1, 2)), *sizes)
        return x_t, jnp.zeros((1,), jnp.int32), caption

    @nn.compact
    def __call__(self, x_t, t, cond) -> Prediction:
        caption = cond if isinstance(cond, Caption) else Caption(cond)
        batch, grid = x_t.shape[0], self.image_size // self.patch
        patches = (self.patch, self.patch)
        embed = nn.Conv(
            self.width,
            patches,
            strides=patches,
            padding="VALID",
            kernel_init=XAVIER,
            name="patch_embed",
        )
        x = embed(x_t).reshape(batch, grid * grid, self.width)
        x = x + sincos_2d(grid, self.width, self.interpolation).astype(x.dtype)
        c = TimestepEmbedder(self.width, dtype=x.dtype, name="t_embed")(jnp.atleast_1d(t))
        if self.size_conditions:
            c = c + self._sizes(caption, x.dtype)
        modulation = nn.Dense(6 * self.width, kernel_init=XAVIER, name="adaln")(nn.silu(c))
        modulation = modulation.reshape(-1, 6, self.width)
        text = CaptionProjection(self.width, name="caption")(caption.embeddings.astype(x.dtype))
        for index in range(self.depth):
            block = Block(self.num_heads, self.mlp_ratio, self.norm_epsilon, name=f"block_{index}")
            x = block(x, text, caption.mask, modulation)
        table = self.param("table", nn.initializers.normal(self.width**-0.5), (2, self.width))
        shift, scale = jnp.split(table.astype(x.dtype) + c[:, None], 2, axis=1)
        out_channels = self.channels * (2 if self.learn_variance else 1)
        final = nn.Dense(self.patch**2 * out_channels, kernel_init=ZEROS, name="final")
        x = final(_modulate(plain_norm(x), shift, scale))
        return to_prediction(x, grid, self.patch, self.learn_variance)

    def _sizes(self, caption: Caption, dtype):
        """[B, D]: a third each for height, width and aspect ratio."""
        if caption.resolution is None or caption.aspect_ratio is None:
            raise InputError(
                "this PixArt has size_conditions: pass cond as Caption(embeddings, mask, "
                "resolution [B, 2], aspect_ratio [B, 1])"
            )
        third, batch = self.width // 3, caption.resolution.shape[0]
        embed = TimestepEmbedder(third, dtype=dtype, name="resolution_embed")
        resolution = embed(caption.resolution.reshape(-1)).reshape(batch, -1)
        embed = TimestepEmbedder(third, dtype=dtype, name="aspect_embed")
        aspect = embed(caption.aspect_ratio.reshape(-1)).reshape(batch, -1)
        return jnp.concatenate([resolution, aspect], axis=-1)

"""The autoencoders of latent models (Rombach et al. 2022, arXiv 2112.10752), plain Flax linen.

Images [B,H,W,3] in [-1, 1] to latents [B,H/f,W/f,C] and back, by a normal distribution
(`AutoencoderKL`) or a codebook (`VQModel`). Layer order follows diffusers: f doubles between
levels, attention only in the middle.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mpqdiff.errors import InputError
from mpqdiff.models.product import Product


class Posterior(NamedTuple):
    """Mean and log variance of the latents of each image, before any scaling."""

    mean: jax.Array
    log_variance: jax.Array


def _conv(channels: int, name: str, size: int = 3):
    return nn.Conv(channels, (size, size), padding="SAME", name=name)


def _norm(x, groups: int, name: str):
    # The quick variance E[x^2] - E[x]^2 loses digits where a decoder's mean is far from zero.
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, name=name)(x)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, around a shortcut (1x1 where the channels change)."""

    channels: int
    groups: int

    @nn.compact
    def __call__(self, x):
        h = _conv(self.channels, "conv1")(nn.silu(_norm(x, self.groups, "norm1")))
        h = _conv(self.channels, "conv2")(nn.silu(_norm(h, self.groups, "norm2")))
        if x.shape[-1] != self.channels:
            x = _conv(self.channels, "shortcut", size=1)(x)
        return x + h


class Attention(nn.Module):
    """One head over all positions of [B,H,W,D], around a shortcut."""

    groups: int

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        h = _norm(x, self.groups, "norm").reshape(batch, height * width, channels)
        q, k, v = jnp.split(nn.Dense(3 * channels, name="qkv")(h), 3, axis=-1)
        scores = Product("bpd,bqd->bpq", name="qk")(q * channels**-0.5, k)
        mixed = Product("bpq,bqd->bpd", name="pv")(nn.softmax(scores), v)
        return x + nn.Dense(channels, name="proj")(mixed).reshape(x.shape)


class Middle(nn.Module):
    """Resnet block, attention where there is any, resnet block."""

    groups: int
    attention: bool

    @nn.compact
    def __call__(self, x):
        x = ResnetBlock(x.shape[-1], self.groups, name="resnet_0")(x)
        if self.attention:
            x = Attention(self.groups, name="attn")(x)
        return ResnetBlock(x.shape[-1], self.groups, name="resnet_1")(x)


class Encoder(nn.Module):
    """Images [B,H,W,C] to [B,H/f,W/f,outputs]."""

    widths: Sequence[int]
    layers: int
    groups: int
    outputs: int
    attention: bool

    @nn.compact
    def __call__(self, x):
        x = _conv(self.widths[0], "conv_in")(x)
        for level, width in enumerate(self.widths):
            for index in range(self.layers):
                x = ResnetBlock(width, self.groups, name=f"down_{level}_resnet_{index}")(x)
            if level < len(self.widths) - 1:
                # Padded below and to the right alone, as the weights were trained.
                pads, name = ((0, 1), (0, 1)), f"down_{level}_conv"
                x = nn.Conv(width, (3, 3), strides=(2, 2), padding=pads, name=name)(x)
        x = Middle(self.groups, self.attention, name="middle")(x)
        x = nn.silu(_norm(x, self.groups, "norm_out"))
        return _conv(self.outputs, "conv_out")(x)


class Decoder(nn.Module):
    """Latents [B,h,w,latent] to images [B,f*h,f*w,C]; one resnet block more a level."""

    widths: Sequence[int]
    layers: int
    groups: int
    channels: int
    attention: bool

    @nn.compact
    def __call__(self, z):
        x = _conv(self.widths[-1], "conv_in")(z)
        x = Middle(self.groups, self.attention, name="middle")(x)
        for level, width in enumerate(reversed(self.widths)):
            for index in range(self.layers + 1):
                x = ResnetBlock(width, self.groups, name=f"up_{level}_resnet_{index}")(x)
            if level < len(self.widths) - 1:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = _conv(width, f"up_{level}_conv")(x)
        return _conv(self.channels, "conv_out")(nn.silu(_norm(x, self.groups, "norm_out")))


class FirstStage(nn.Module):
    """What every autoencoder of latents has: these fields, an `encoder` and a `decoder`.

    Apply with `method="encode"`, `"decode"`, `"to_latents"`, `"to_images"`: the first two are in
    the autoencoder's own units, the others in the diffusion model's.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: Sequence[int] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    scaling_factor: float = 0.18215
    attention: bool = True

    @nn.nowrap
    def sides(self, outputs: int) -> tuple[Encoder, Decoder]:
        """(encoder, decoder), the encoder with so many outputs; for `setup`."""
        sizes = tuple(self.widths), self.layers, self.groups
        encoder = Encoder(*sizes, outputs, self.attention)
        return encoder, Decoder(*sizes, self.channels, self.attention)

    @nn.nowrap
    def check(self) -> None:
        """InputError on widths that the groups do not divide, or on none."""
        if not self.widths or any(width <= 0 or width % self.groups for width in self.widths):
            raise InputError(
                f"{type(self).__name__}: widths={tuple(self.widths)} must be positive multiples "
                f"of groups={self.groups}"
            )

    @nn.nowrap
    def example_inputs(self):
        """(images,) of the least size, zeros: parameters depend on no size."""
        size = 2 ** (len(self.widths) - 1)
        return (jnp.zeros((1, size, size, self.channels)),)


class AutoencoderKL(FirstStage):
    """A diffusion model sees its latents as (z - shift_factor) * scaling_factor."""

    shift_factor: float = 0.0
    quant_conv: bool = True
    post_quant_conv: bool = True

    def setup(self):
        self.encoder, self.decoder = self.sides(2 * self.latent_channels)
        if self.quant_conv:
            self.quant = nn.Conv(2 * self.latent_channels, (1, 1))
        if self.post_quant_conv:
            self.post_quant = nn.Conv(self.latent_channels, (1, 1))

    def encode(self, images) -> Posterior:
        """Images [B,H,W,C] in [-1, 1] to the distribution of their latents."""
        moments = self.encoder(images)
        mean, log_variance = jnp.split(
            self.quant(moments) if self.quant_conv else moments, 2, axis=-1
        )
        return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, z):
        """Latents [B,h,w,latent] in the autoencoder's units to images."""
        return self.decoder(self.post_quant(z) if self.post_quant_conv else z)

    def to_latents(self, images, noise=0.0):
        """What a diffusion model is trained on: mean + std * noise, shifted and scaled."""
        mean, log_variance = self.encode(images)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        return (z - self.shift_factor) * self.scaling_factor

    def to_images(self, latents):
        """Images of a diffusion model's latents."""
        return self.decode(latents / self.scaling_factor + self.shift_factor)

    def __call__(self, images):
        """The reconstruction from the mean; touches every parameter."""
        return self.decode(self.encode(images).mean)


class VQModel(FirstStage):
    """Decodes the nearest codes of its latents; a diffusion model sees z * scaling_factor.

    The defaults are those of the f=4 first stage, whose latents are not scaled.
    """

    latent_channels: int = 3
    widths: Sequence[int] = (128, 256, 512)
    scaling_factor: float = 1.0
    num_codes: int = 8192

    def setup(self):
        channels = self.latent_channels
        self.encoder, self.decoder = self.sides(channels)
        self.quant = nn.Conv(channels, (1, 1))
        self.post_quant = nn.Conv(channels, (1, 1))
        start, shape = nn.initializers.normal(1 / self.num_codes), (self.num_codes, channels)
        self.codebook = self.param("codebook", start, shape)

    def encode(self, images):
        """Images [B,H,W,C] in [-1, 1] to their latents before quantisation."""
        return self.quant(self.encoder(images))

    def quantise(self, z):
        """The code nearest to each position of z [B,h,w,latent], the first of several."""
        # Channel by channel, for XLA then fuses all of it into the argmin: the distances of an
        # image to 8192 codes, never in memory, are larger than anything in the decoder.
        distances = jnp.zeros(())
        for channel in range(self.latent_channels):
            distances += (z[..., channel, None] - self.codebook[:, channel]) ** 2
        return self.codebook[jnp.argmin(distances, axis=-1)]

    def decode(self, z):
        """Latents [B,h,w,latent], quantised or not, in the autoencoder's units to images."""
        return self.decoder(self.post_quant(self.quantise(z)))

    def to_latents(self, images):
        """What a diffusion model is trained on: scaled, not quantised."""
        return self.encode(images) * self.scaling_factor

    def to_images(self, latents):
        """Images of a diffusion model's latents."""
        return self.decode(latents / self.scaling_factor)

    def __call__(self, images):
        """The reconstruction; touches every parameter."""
        return self.decode(self.encode(images))

"""One U-Net for DDPM, ADM (guided diffusion) and latent diffusion, plain Flax linen, NHWC.

Ho et al. 2020 (arXiv 2006.11239), Dhariwal & Nichol 2021 (2105.05233), Rombach et al. 2022
(2112.10752). What they differ in is a field. No line here knows of quantisation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from mpqdiff.denoiser import Prediction
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.models.embeddings import TimeEmbedding
from mpqdiff.models.unet_blocks import (
    ATTENTION_SCALES,
    ZEROS,
    ResBlock,
    SelfAttention,
    SkipConcat,
    SpatialTransformer,
    double,
)

# What `cond` is: unused; labels [B] added to the time embedding; context [B,P,context_width] for
# cross-attention; labels [B] of which each becomes a context of one token.
CONDITIONS = ("none", "label", "context", "label_context")
# Padding of the strided convolution: (before, after) on both axes. DDPM pads at the end only.
DOWN_PADDING = {"both": ((1, 1), (1, 1)), "end": ((0, 1), (0, 1))}


class UNet(nn.Module):
    """eps prediction for images [B,H,W,C]. Level i has `widths[i]` channels at 2^-i of the size.

    Levels in `attention_levels` attend after every residual block, and the middle does once: with
    a context through `transformer_depth` blocks of cross-attention, else over positions alone.
    `num_heads` and `transformer_depth` are one number or one a level. With `null_class` label
    `num_classes` is the null class for guidance. `learn_variance` as in `DiT`. Defaults are ADM's
    and latent diffusion's; DDPM has down_padding "end", cos_first False, frequency_shift 1, eps
    1e-6. `check` says what does not fit together.
    """

    image_size: int
    channels: int
    widths: tuple[int, ...]
    blocks_per_level: int = 2
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = True
    num_heads: int | tuple[int, ...] = 1
    condition: str = "none"
    num_classes: int = 1
    null_class: bool = True
    context_width: int | None = None
    transformer_depth: int | tuple[int, ...] = 1
    scale_shift: bool = False
    resample_in_blocks: bool = False
    down_padding: str = "both"
    time_width: int | None = None  # of the sinusoid; None: widths[0]
    embed_width: int | None = None  # of the time embedding; None: 4 * time_width
    cos_first: bool = True
    frequency_shift: float = 0.0
    groups: int = 32
    norm_eps: float = 1e-5
    attention_scale: str = "query"
    learn_variance: bool = False

    @nn.compact
    def __call__(self, x_t, t, cond) -> Prediction:
        last = len(self.widths) - 1
        emb, context = self.condition_on(t, cond, x_t.dtype)
        h = nn.Conv(self.widths[0], (3, 3), padding=1, name="conv_in")(x_t)
        skips = [h]
        for level in range(last + 1):
            for index in range(self.blocks_per_level):
                h = self.residual(level, f"down_{level}_res_{index}")(h, emb)
                if level in self.attention_levels:
                    h = self.attend(level, f"down_{level}_attn_{index}", h, context)
                skips.append(h)
            if level < last:
                h = self.resample(level, "down", h, emb)
                skips.append(h)
        h = self.residual(last, "mid_res_0")(h, emb)
        if self.middle_attention:
            h = self.attend(last, "mid_attn", h, context)
        h = self.residual(last, "mid_res_1")(h, emb)
        for level in range(last, -1, -1):
            for index in range(self.blocks_per_level + 1):
                h = SkipConcat(name=f"up_{level}_skip_{index}")(h, skips.pop())
                h = self.residual(level, f"up_{level}_res_{index}")(h, emb)
                if level in self.attention_levels:
                    h = self.attend(level, f"up_{level}_attn_{index}", h, context)
            if level:
                h = self.resample(level, "up", h, emb)
        outputs = self.channels * (2 if self.learn_variance else 1)
        h = nn.silu(self.norm(name="norm_out")(h))
        out = nn.Conv(outputs, (3, 3), padding=1, kernel_init=ZEROS, name="conv_out")(h)
        return Prediction(*jnp.split(out, 2, axis=-1)) if self.learn_variance else Prediction(out)

    @property
    def norm(self) -> Callable:
        # The fast variance E[x^2] - E[x]^2 loses digits where the mean is large.
        return partial(nn.GroupNorm, self.groups, epsilon=self.norm_eps, use_fast_variance=False)

    def example_inputs(self):
        """Zeros to call the network with: (x_t, t, cond) of one image, a context of one token."""
        x_t = jnp.zeros((1, self.image_size, self.image_size, self.channels))
        labels = jnp.zeros((1,), jnp.int32)
        crossed = self.condition == "context"
        return x_t, labels, jnp.zeros((1, 1, self.context_width or 0)) if crossed else labels

    def condition_on(self, t, cond, dtype):
        """(time embedding [B,E], or [1,E] of a scalar t; context [B,P,C] or None)."""
        time_width = self.time_width or self.widths[0]
        width = self.embed_width or 4 * time_width
        embed = TimeEmbedding(
            width, time_width, self.cos_first, self.frequency_shift, dtype, name="time"
        )
        emb = embed(jnp.atleast_1d(t))
        embed_label = partial(nn.Embed, self.num_classes + self.null_class, name="label_embed")
        if self.condition == "label":
            return emb + embed_label(width)(cond), None
        if self.condition == "label_context":
            return emb, embed_label(self.context_width or 0)(cond)[:, None]
        return emb, cond if self.condition == "context" else None

    def residual(self, level: int, name: str, resample: str = "none") -> ResBlock:
        return ResBlock(self.widths[level], self.norm, self.scale_shift, resample, name=name)

    def attend(self, level: int, name: str, h, context):
        heads = at_level(self.num_heads, level)
        if context is None:
            return SelfAttention(heads, self.attention_scale, self.norm, name=name)(h)
        return SpatialTransformer(
            heads,
            self.attention_scale,
            self.groups,
            at_level(self.transformer_depth, level),
            self.condition == "label_context",
            name=name,
        )(h, context)

    def resample(self, level: int, direction: str, h, emb):
        name = f"{direction}_{level}_resample"
        if self.resample_in_blocks:
            return self.residual(level, name, direction)(h, emb)
        conv = partial(nn.Conv, self.widths[level], (3, 3), name=name)
        if direction == "down":
            return conv(strides=2, padding=DOWN_PADDING[self.down_padding])(h)
        return conv(padding=1)(double(h))


def at_level(value, level: int) -> int:
    """A field that is one number for all levels, or a sequence with one for each."""
    return value if isinstance(value, int) else value[level]


def parameter_shapes(unet: UNet) -> dict[str, tuple[int, ...]]:
    """{path of a parameter ("mid_res_0/conv1/kernel"): its shape}. Computes nothing."""
    inputs = jax.eval_shape(unet.example_inputs)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]
    flat: dict[str, Any] = traverse_util.flatten_dict(shapes, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def check(unet: UNet) -> None:
    """Raises InputError for fields that do not fit together, with the value and what is needed."""
    levels = len(unet.widths)
    fields = (
        ("condition", unet.condition, CONDITIONS),
        ("down_padding", unet.down_padding, DOWN_PADDING),
        ("attention_scale", unet.attention_scale, ATTENTION_SCALES),
    )
    for name, value, known in fields:
        if value not in known:
            raise unknown_name(f"unet {name}", value, known)
    for name in ("num_heads", "transformer_depth"):
        value = getattr(unet, name)
        if not isinstance(value, int) and len(value) != levels:
            raise InputError(
                f"unet: {name}={value}: one number, or one for each of {levels} levels"
            )
    counts = {
        "image_size": [unet.image_size],
        "channels": [unet.channels],
        "widths": unet.widths,
        "blocks_per_level": [unet.blocks_per_level],
        "num_heads": [at_level(unet.num_heads, i) for i in range(levels)],
        "num_classes": [unet.num_classes],
        "transformer_depth": [at_level(unet.transformer_depth, i) for i in range(levels)],
    }
    for name, values in counts.items():
        if not values or min(values) < 1:
            raise InputError(f"unet: {name}={getattr(unet, name)}: every count must be positive")
    if unet.image_size % 2 ** (levels - 1):
        raise InputError(
            f"unet: image_size={unet.image_size} must be a multiple of {2 ** (levels - 1)}, as "
            f"{levels} levels halve it {levels - 1} times"
        )
    if any(width % unet.groups for width in unet.widths):
        raise InputError(f"unet: widths={unet.widths} must be multiples of groups={unet.groups}")
    if any(level not in range(levels) for level in unet.attention_levels):
        raise InputError(
            f"unet: attention_levels={unet.attention_levels} must lie in 0..{levels - 1}"
        )
    attending = {*unet.attention_levels, *([levels - 1] if unet.middle_attention else [])}
    for level in sorted(attending):
        width, heads = unet.widths[level], at_level(unet.num_heads, level)
        if width % heads:
            raise InputError(
                f"unet: width {width} of level {level} is no multiple of {heads} heads"
            )
    time_width = unet.time_width or unet.widths[0]
    if time_width % 2 or time_width // 2 <= unet.frequency_shift:
        raise InputError(
            f"unet: time_width={time_width} must be even and above twice frequency_shift="
            f"{unet.frequency_shift}"
        )
    if ("context" in unet.condition) != bool(unet.context_width):
        raise InputError(
            f"unet: condition={unet.condition!r} with context_width={unet.context_width}: a width "
            "goes with the conditions context and label_context, and they need one"
        )

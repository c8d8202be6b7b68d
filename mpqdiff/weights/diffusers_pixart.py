"""diffusers' PixArtTransformer2DModel (also under its older name, Transformer2DModel)."""

from collections.abc import Mapping
from typing import Any

from mpqdiff.errors import InputError
from mpqdiff.weights.diffusers_dit import transformer_blocks
from mpqdiff.weights.mapping import Entry
from mpqdiff.weights.torch_layers import (
    changed,
    convolution,
    fused,
    learns_variance,
    linear,
    resolve,
)

# The fixed position table, and the caption of classifier-free guidance, which is an input here.
IGNORED = ("pos_embed.pos_embed", "caption_projection.y_embedding")
DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
}
FIXED = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "attention_type": "default",
}
# Of models.pixart.PixArt.
PLAIN = {
    "learn_variance": True,
    "interpolation": 1.0,
    "size_conditions": False,
    "norm_epsilon": 1e-6,
}


def module_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.pixart.PixArt`."""
    c = _resolved(config)
    scale = c["interpolation_scale"]
    kwargs = {
        "image_size": c["sample_size"],
        "channels": c["in_channels"],
        "patch": c["patch_size"],
        "width": c["num_attention_heads"] * c["attention_head_dim"],
        "depth": c["num_layers"],
        "num_heads": c["num_attention_heads"],
        "text_width": c["caption_channels"],
        "learn_variance": learns_variance(c["in_channels"], c["out_channels"]),
        "interpolation": max(c["sample_size"] // 64, 1) if scale is None else scale,
        "size_conditions": c["use_additional_conditions"],
        "norm_epsilon": c["norm_eps"],
    }
    return changed(kwargs, PLAIN)


def _resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    c = resolve(config, DEFAULTS, FIXED)
    width = c["num_attention_heads"] * c["attention_head_dim"]
    if not c["caption_channels"] or c["cross_attention_dim"] != width:
        raise InputError(
            f"config.json has caption_channels={c['caption_channels']!r} and cross_attention_dim="
            f"{c['cross_attention_dim']!r}: a PixArt projects its captions to its own width, "
            f"{width}"
        )
    if c["use_additional_conditions"] is None:  # as diffusers decides
        c["use_additional_conditions"] = c["sample_size"] == 128
    return c


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Where each parameter comes from."""
    c = _resolved(config)
    embedders = {"t_embed": "timestep_embedder"}
    if c["use_additional_conditions"]:
        embedders |= {
            "resolution_embed": "resolution_embedder",
            "aspect_embed": "aspect_ratio_embedder",
        }
    sources = {ours: f"adaln_single.emb.{theirs}" for ours, theirs in embedders.items()}
    sources["caption"] = "caption_projection"
    found = [
        *convolution("patch_embed", "pos_embed.proj"),
        *linear("adaln", "adaln_single.linear"),
        *linear("final", "proj_out"),
        *transformer_blocks(c["num_layers"]),
        Entry("table", ("scale_shift_table",)),
    ]
    for ours, theirs in sources.items():
        found += linear(f"{ours}/fc1", f"{theirs}.linear_1")
        found += linear(f"{ours}/fc2", f"{theirs}.linear_2")
    for index in range(c["num_layers"]):
        ours, theirs = f"block_{index}", f"transformer_blocks.{index}"
        found.append(Entry(f"{ours}/table", (f"{theirs}.scale_shift_table",)))
        found += linear(f"{ours}/cross/q", f"{theirs}.attn2.to_q")
        found += fused(f"{ours}/cross/kv", f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v")
        found += linear(f"{ours}/cross/proj", f"{theirs}.attn2.to_out.0")
    return found

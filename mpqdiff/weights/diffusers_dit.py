"""diffusers' DiTTransformer2DModel (also under its older name, Transformer2DModel)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.weights.mapping import Entry
from mpqdiff.weights.torch_layers import (
    changed,
    convolution,
    fused,
    learns_variance,
    linear,
    resolve,
)

IGNORED = ("pos_embed.pos_embed",)  # the fixed table, where a buffer was saved with the weights
DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
# Of models.dit.DiT: what facebookresearch/DiT computes.
PLAIN = {"timestep_freq_shift": 0, "mlp_norm_epsilon": 1e-6}


def module_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.dit.DiT` with which it computes what diffusers computes."""
    c = resolve(config, DEFAULTS, FIXED)
    kwargs = {
        "image_size": c["sample_size"],
        "channels": c["in_channels"],
        "patch": c["patch_size"],
        "width": c["num_attention_heads"] * c["attention_head_dim"],
        "depth": c["num_layers"],
        "num_heads": c["num_attention_heads"],
        "num_classes": c["num_embeds_ada_norm"],
        "learn_variance": learns_variance(c["in_channels"], c["out_channels"]),
        "timestep_freq_shift": 1,
        "mlp_norm_epsilon": c["norm_eps"],
    }
    return changed(kwargs, PLAIN)


def trained_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same without diffusers' two departures: what weights trained by facebookresearch/DiT
    need. With them, the noise estimates of such weights are off by a fifth at t = 500."""
    kwargs = module_kwargs(config)
    return {name: value for name, value in kwargs.items() if name not in PLAIN}


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Where each parameter comes from. Every block has a copy of the embedders: they must agree."""
    depth = resolve(config, DEFAULTS, FIXED)["num_layers"]
    embedder = "transformer_blocks.{}.norm1.emb."
    found = [
        *convolution("patch_embed", "pos_embed.proj"),
        *linear("final_adaln", "proj_out_1"),
        *linear("final", "proj_out_2"),
        *transformer_blocks(depth, modulation="norm1.linear"),
        _copied("label_embed/embedding", embedder + "class_embedder.embedding_table.weight", depth),
    ]
    for ours, theirs in (("fc1", "linear_1"), ("fc2", "linear_2")):
        layer = f"{embedder}timestep_embedder.{theirs}"
        found.append(_copied(f"t_embed/{ours}/kernel", f"{layer}.weight", depth, transpose=True))
        found.append(_copied(f"t_embed/{ours}/bias", f"{layer}.bias", depth))
    return found


def transformer_blocks(depth: int, *, modulation: str = "") -> list[Entry]:
    """Self-attention and MLP of each block, as diffusers names them, and its modulation."""
    found = []
    for index in range(depth):
        ours, theirs = f"block_{index}", f"transformer_blocks.{index}"
        if modulation:
            found += linear(f"{ours}/adaln", f"{theirs}.{modulation}")
        found += fused(f"{ours}/attn/qkv", *(f"{theirs}.attn1.to_{part}" for part in "qkv"))
        found += linear(f"{ours}/attn/proj", f"{theirs}.attn1.to_out.0")
        found += linear(f"{ours}/mlp/fc1", f"{theirs}.ff.net.0.proj")
        found += linear(f"{ours}/mlp/fc2", f"{theirs}.ff.net.2")
    return found


def _copied(target: str, pattern: str, depth: int, *, transpose: bool = False) -> Entry:
    """One parameter from the copies that all blocks hold. InputError when they differ."""
    keys = tuple(pattern.format(index) for index in range(depth))

    def one_of(first, *others):
        for key, other in zip(keys[1:], others, strict=True):
            if not np.array_equal(first, other):
                raise InputError(
                    f"{key} differs from {keys[0]}: blocks with embedders of their own are not a "
                    "DiT, which has one"
                )
        return first.T if transpose else first

    return Entry(target, keys, one_of)

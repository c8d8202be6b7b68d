"""diffusers' AutoencoderKL and VQModel."""

from collections.abc import Mapping
from typing import Any

from mpqdiff.errors import InputError
from mpqdiff.weights.mapping import Entry
from mpqdiff.weights.torch_layers import changed, convolution, fused, linear, norm, resolve

IGNORED: tuple[str, ...] = ()
SHARED = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
DEFAULTS = {
    **SHARED,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
VQ_DEFAULTS = {
    **SHARED,
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
    "scaling_factor": 1.0,  # for its type: it has to be there
}
VQ_FIXED = {"act_fn": "silu", "norm_type": "group", "lookup_from_codebook": False}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# Of models.vae.AutoencoderKL.
PLAIN = {"shift_factor": 0.0, "quant_conv": True, "post_quant_conv": True, "attention": True}


def module_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.vae.AutoencoderKL`."""
    c = _resolved(config)
    kwargs = {
        **_sizes(c),
        "shift_factor": c["shift_factor"] or 0.0,
        "quant_conv": c["use_quant_conv"],
        "post_quant_conv": c["use_post_quant_conv"],
    }
    return changed(kwargs, PLAIN)


def vq_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.vae.VQModel`.

    Raises InputError where the scaling factor is missing, or the codes have another width than
    the latents.
    """
    if "scaling_factor" not in config:
        raise InputError(
            "config.json has no scaling_factor: diffusers then takes 0.18215, but the VQ models of "
            "latent diffusion were trained with 1.0; write into it what the denoiser was trained "
            "with"
        )
    c = _resolved(config, VQ_DEFAULTS, VQ_FIXED)
    if c["vq_embed_dim"] not in (None, c["latent_channels"]):
        raise InputError(
            f"config.json has vq_embed_dim={c['vq_embed_dim']}, supported: latent_channels="
            f"{c['latent_channels']}"
        )
    return changed({**_sizes(c), "num_codes": c["num_vq_embeddings"]}, {"attention": True})


def _sizes(c: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `models.vae.FirstStage`."""
    return {
        "channels": c["in_channels"],
        "latent_channels": c["latent_channels"],
        "widths": list(c["block_out_channels"]),
        "layers": c["layers_per_block"],
        "groups": c["norm_num_groups"],
        "scaling_factor": c["scaling_factor"],
        "attention": c["mid_block_add_attention"],
    }


def _resolved(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any] = DEFAULTS,
    fixed: Mapping[str, Any] = FIXED,
) -> dict[str, Any]:
    given = dict(config)
    if "block_out_channels" in given:  # a tuple where the config was not read from JSON
        given["block_out_channels"] = list(given["block_out_channels"])
    c = resolve(given, defaults, fixed)
    levels = len(c["block_out_channels"])
    for key, kind in BLOCKS.items():
        types = list(c.get(key, [kind] * levels))
        if types != [kind] * levels:
            raise InputError(
                f"config.json has {key}={types}, supported: {kind}, one for each of "
                f"block_out_channels={c['block_out_channels']}"
            )
    if c["in_channels"] != c["out_channels"]:
        raise InputError(
            f"config.json has in_channels={c['in_channels']} and out_channels="
            f"{c['out_channels']}: an autoencoder gives back what it was given"
        )
    return c


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Where each parameter of an AutoencoderKL comes from."""
    c = _resolved(config)
    found = [*convolution("quant", "quant_conv")] if c["use_quant_conv"] else []
    found += convolution("post_quant", "post_quant_conv") if c["use_post_quant_conv"] else []
    return found + _sides(c)


def vq_entries(config: Mapping[str, Any]) -> list[Entry]:
    """Where each parameter of a VQModel comes from."""
    found = convolution("quant", "quant_conv") + convolution("post_quant", "post_quant_conv")
    found.append(Entry("codebook", ("quantize.embedding.weight",)))
    return found + _sides(_resolved(config, VQ_DEFAULTS, VQ_FIXED))


def _sides(c: Mapping[str, Any]) -> list[Entry]:
    """Encoder and decoder."""
    widths, layers = c["block_out_channels"], c["layers_per_block"]
    found = []
    sides = (
        ("encoder", "down", "downsamplers", widths, layers),
        ("decoder", "up", "upsamplers", widths[::-1], layers + 1),
    )
    for part, way, resampler, order, count in sides:
        found += convolution(f"{part}/conv_in", f"{part}.conv_in")
        found += norm(f"{part}/norm_out", f"{part}.conv_norm_out")
        found += convolution(f"{part}/conv_out", f"{part}.conv_out")
        found += _middle(f"{part}/middle", f"{part}.mid_block", c["mid_block_add_attention"])
        before = order[0]
        for level, width in enumerate(order):
            ours, theirs = f"{part}/{way}_{level}", f"{part}.{way}_blocks.{level}"
            for index in range(count):
                found += _resnet(
                    f"{ours}_resnet_{index}", f"{theirs}.resnets.{index}", before != width
                )
                before = width
            if level < len(order) - 1:
                found += convolution(f"{ours}_conv", f"{theirs}.{resampler}.0.conv")
    return found


def _resnet(ours: str, theirs: str, shortcut: bool) -> list[Entry]:
    found = []
    for index in (1, 2):
        found += norm(f"{ours}/norm{index}", f"{theirs}.norm{index}")
        found += convolution(f"{ours}/conv{index}", f"{theirs}.conv{index}")
    return found + (convolution(f"{ours}/shortcut", f"{theirs}.conv_shortcut") if shortcut else [])


def _middle(ours: str, theirs: str, attention: bool) -> list[Entry]:
    found = []
    for index in (0, 1):
        found += _resnet(f"{ours}/resnet_{index}", f"{theirs}.resnets.{index}", False)
    if attention:
        block = f"{theirs}.attentions.0"
        found += norm(f"{ours}/attn/norm", f"{block}.group_norm")
        found += fused(f"{ours}/attn/qkv", *(f"{block}.to_{part}" for part in "qkv"))
        found += linear(f"{ours}/attn/proj", f"{block}.to_out.0")
    return found

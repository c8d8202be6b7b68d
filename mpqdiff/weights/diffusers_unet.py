"""diffusers' `UNet2DModel` and `UNet2DConditionModel` as a `models.unet.UNet`.

`module_kwargs` reads a `config.json`, `entries` names the source of every parameter. A
configuration that asks for something this U-Net does not do is refused by field.
"""

from collections.abc import Mapping
from typing import Any

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.models.unet import UNet, check, parameter_shapes
from mpqdiff.weights.mapping import Entry
from mpqdiff.weights.unet_paths import (
    SEGMENTS,
    channels,
    condition_on_labels,
    split_block,
    torch_leaf,
    transformer_names,
)

# Source keys that the network has no use for: none, in either class.
IGNORED: tuple[str, ...] = ()

_BOTH = {
    "sample_size": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "num_class_embeds": None,
}
# What a config.json leaves out, by its `_class_name`. Other fields have to be in it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **_BOTH,
        "in_channels": 3,
        "out_channels": 3,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "attn_norm_num_groups": None,
        "add_attention": True,
    },
    "UNet2DConditionModel": {
        **_BOTH,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
    },
}
REQUIRED = ("block_out_channels", "down_block_types", "up_block_types")
# Fields that must have one of these values where they are given: others are not built here.
SUPPORTED: dict[str, tuple] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (0, 1),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_type": ("positional",),
}
# Fields without an effect on what the network computes in float32.
IRRELEVANT = {"dropout", "num_train_timesteps", "addition_embed_type_num_heads", "upcast_attention"}
# Block types: (attends, how it resamples; None: as `downsample_type` or `upsample_type` says).
BLOCKS: dict[str, dict[str, tuple[bool, str | None]]] = {
    "UNet2DModel": {
        "DownBlock2D": (False, "conv"),
        "UpBlock2D": (False, "conv"),
        "ResnetDownsampleBlock2D": (False, "resnet"),
        "ResnetUpsampleBlock2D": (False, "resnet"),
        "AttnDownBlock2D": (True, None),
        "AttnUpBlock2D": (True, None),
    },
    "UNet2DConditionModel": {
        "DownBlock2D": (False, "conv"),
        "UpBlock2D": (False, "conv"),
        "CrossAttnDownBlock2D": (True, "conv"),
        "CrossAttnUpBlock2D": (True, "conv"),
    },
}
MIDDLES = {"UNet2DModel": "UNetMidBlock2D", "UNet2DConditionModel": "UNetMidBlock2DCrossAttn"}

OLD_SEGMENTS = {**SEGMENTS, "q": "query", "k": "key", "v": "value", "out": "proj_attn"}
WHOLE = {
    "time/fc1": "time_embedding.linear_1",
    "time/fc2": "time_embedding.linear_2",
    "label_embed": "class_embedding",
    "norm_out": "conv_norm_out",
}


def module_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `UNet` for a diffusers configuration.

    Raises InputError naming the field for what this U-Net does not build.
    """
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    name = config.get("_class_name", "")
    if name not in DEFAULTS:
        raise unknown_name("diffusers U-Net (_class_name)", name, DEFAULTS)
    _refuse_unsupported(given, DEFAULTS[name], SUPPORTED | {"mid_block_type": (MIDDLES[name],)})
    c = {**DEFAULTS[name], **given}
    missing = [
        f for f in ("block_out_channels", "down_block_types", "up_block_types") if f not in c
    ]
    if missing or not isinstance(c["sample_size"], int):
        what = f"lacks {', '.join(missing)}" if missing else f"has sample_size={c['sample_size']}"
        raise InputError(f"diffusers config {what}: give it (sample_size: one int)")
    widths = tuple(c["block_out_channels"])
    attending, in_blocks = _blocks(c, name)
    crossed = name == "UNet2DConditionModel"
    if not isinstance(c["layers_per_block"], int):
        raise _unsupported("layers_per_block", c["layers_per_block"], ("one int",))
    if crossed and c["num_class_embeds"]:
        raise _unsupported("num_class_embeds", c["num_class_embeds"], (None,))
    kwargs = {
        "image_size": c["sample_size"],
        "widths": widths,
        "blocks_per_level": c["layers_per_block"],
        "attention_levels": attending,
        "num_heads": _heads(c, widths, crossed),
        "embed_width": c["time_embedding_dim"],
        "scale_shift": c["resnet_time_scale_shift"] == "scale_shift",
        "resample_in_blocks": in_blocks,
        "down_padding": "both" if c["downsample_padding"] else "end",
        "cos_first": bool(c["flip_sin_to_cos"]),
        "frequency_shift": c["freq_shift"],
        "groups": c["norm_num_groups"],
        "norm_eps": c["norm_eps"],
        **channels(c["in_channels"], c["out_channels"]),
    }
    if crossed:
        depth = c["transformer_layers_per_block"]
        kwargs["condition"] = "context"
        kwargs["context_width"] = _one("cross_attention_dim", c["cross_attention_dim"])
        kwargs["transformer_depth"] = depth if isinstance(depth, int) else tuple(depth)
    else:
        _check_middle(c)
        kwargs["middle_attention"] = bool(c["add_attention"])
        if c["num_class_embeds"]:
            kwargs |= condition_on_labels(c["num_class_embeds"])
    check(UNet(**kwargs))
    return kwargs


def entries(config: Mapping[str, Any], *, old_names: bool = False) -> list[Entry]:
    """Where each parameter of `UNet(**module_kwargs(config))` comes from.

    `old_names`: attention weights are called query, key, value and proj_attn, as in files from
    before diffusers 0.17.
    """
    unet = UNet(**module_kwargs(config))
    segments = OLD_SEGMENTS if old_names else SEGMENTS
    return [
        Entry(path, (f"{source(unet, module, segments)}.{leaf}",), make)
        for path, shape in parameter_shapes(unet).items()
        for module, leaf, make in [torch_leaf(path, shape)]
    ]


def source(unet: UNet, module: str, segments: Mapping[str, str]) -> str:
    """diffusers' name of a module, given its path here."""
    if module in WHOLE or ("/" not in module and module.startswith("conv_")):
        return WHOLE.get(module, module)
    block, *inner = module.split("/")
    side, level, kind, index = split_block(block)
    collection = {"res": "resnets", "attn": "attentions", "resample": f"{side}samplers"}[kind]
    if side == "mid":
        place = f"mid_block.{collection}.{index}"
    else:
        place = f"{side}_blocks.{level if side == 'down' else len(unet.widths) - 1 - level}"
        place = f"{place}.{collection}.{index}"
    if kind == "resample" and not inner:
        return f"{place}.conv"
    if kind == "attn" and unet.context_width is None:  # SelfAttention: norm, attn/q, ...
        names = {**segments, "norm": "group_norm"}
        return f"{place}.{names[inner[-1]]}"
    return ".".join([place, *transformer_names(inner, segments)])


def _blocks(c, name: str) -> tuple[tuple[int, ...], bool]:
    """(levels that attend, whether residual blocks resample) of the block types."""
    known, last = BLOCKS[name], len(c["block_out_channels"]) - 1
    attending, ways = {}, set()
    for side, default in (("down", "downsample_type"), ("up", "upsample_type")):
        types = list(c[f"{side}_block_types"])[:: 1 if side == "down" else -1]
        if len(types) != last + 1:
            raise InputError(f"diffusers config: {len(types)} {side} blocks, {last + 1} widths")
        unknown = [block for block in types if block not in known]
        if unknown:
            raise _unsupported(f"{side}_block_types", unknown[0], known)
        attending[side] = tuple(level for level in range(last + 1) if known[types[level]][0])
        resampling = types[:-1] if side == "down" else types[1:]
        ways |= {known[block][1] or c[default] for block in resampling}
    if attending["down"] != attending["up"]:
        raise InputError(f"diffusers config: levels {attending} attend, expected the same levels")
    if len(ways) > 1 or ways - {"conv", "resnet"}:
        raise _unsupported("downsample_type, upsample_type", sorted(ways), ("conv", "resnet"))
    return attending["down"], ways == {"resnet"}


def _heads(c, widths, crossed: bool) -> int | tuple[int, ...]:
    """`attention_head_dim` is a head's width in UNet2DModel, and in the other the heads' number."""
    value = c["attention_head_dim"]
    if crossed:
        return value if isinstance(value, int) else tuple(value)
    return 1 if value is None else tuple(max(1, width // value) for width in widths)


def _check_middle(c) -> None:
    groups = c["attn_norm_num_groups"]
    if groups is None and c["resnet_time_scale_shift"] == "default":
        return
    if c["add_attention"] and groups != c["norm_num_groups"]:
        raise _unsupported("attn_norm_num_groups", groups, (c["norm_num_groups"],))


def _one(field: str, value) -> int:
    values = {value} if isinstance(value, int) else set(value)
    if len(values) > 1:
        raise _unsupported(field, value, ("one value for all levels",))
    return values.pop()


def _refuse_unsupported(given: Mapping, known: Mapping, supported: Mapping[str, tuple]) -> None:
    free = {*known, *REQUIRED, *IRRELEVANT}
    for field, value in given.items():
        allowed = supported.get(field, () if field in free else (None, False))
        if allowed and value not in allowed:
            raise _unsupported(field, value, allowed)


def _unsupported(field: str, value, allowed) -> InputError:
    expected = ", ".join(str(choice) for choice in allowed)
    return InputError(f"diffusers config: {field}={value!r} is not supported; expected {expected}")

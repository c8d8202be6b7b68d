"""CompVis latent-diffusion and OpenAI guided-diffusion U-Nets as a `models.unet.UNet`.

Both are one `UNetModel` with numbered blocks. `config` is what its constructor is given
(`unet_config.params` of a latent-diffusion YAML file); `guided_config` makes one of
guided-diffusion's command line flags.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.models.unet import UNet, at_level, check, parameter_shapes
from mpqdiff.weights.mapping import Entry
from mpqdiff.weights.unet_paths import (
    SEGMENTS,
    channels,
    condition_on_labels,
    split_block,
    torch_leaf,
    transformer_names,
)

LATENT_PREFIX = "model.diffusion_model."  # where a latent-diffusion checkpoint holds the network
REQUIRED = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks")
DEFAULTS: dict[str, Any] = {
    "attention_resolutions": (),
    "channel_mult": (1, 2, 4, 8),
    "num_classes": None,
    "num_heads": -1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "use_spatial_transformer": False,
    "transformer_depth": 1,
    "context_dim": None,
    "n_classes": None,  # ours: rows of the ClassEmbedder whose one token is the context
}
FIXED = {"conv_resample": True, "dims": 2, "n_embed": None}
IRRELEVANT = {"dropout", "use_checkpoint", "use_fp16", "legacy"}
# What else a latent-diffusion checkpoint holds: first stage, conditioning, schedule, bookkeeping.
BESIDE = (
    "first_stage_model.*",
    "cond_stage_model.*",
    "model_ema.decay",
    "model_ema.num_updates",
    "alphas_cumprod*",
    "betas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "loss.*",
    "lvlb_weights",
    "posterior_*",
    "scale_factor",
    "sqrt_*",
)
# Of attention to one token: the softmax over it is 1 whatever the query and the key.
DEAD = ("*attn2.to_q.weight", "*attn2.to_k.weight", "*transformer_blocks.*.norm2.*")
DEAD_AVERAGED = ("*attn2to_qweight", "*attn2to_kweight", "*transformer_blocks?norm2*")

GUIDED_MULTIPLIERS = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
GUIDED_CLASSES = 1000

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embed": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}
WHOLE = {
    "conv_in": "input_blocks.0.0",
    "time/fc1": "time_embed.0",
    "time/fc2": "time_embed.2",
    "label_embed": "label_emb",
    "norm_out": "out.0",
    "conv_out": "out.2",
}


def module_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `UNet` for `UNetModel`'s. `attention_resolutions` are downsampling factors.

    Raises InputError naming the field for what is missing or not built here.
    """
    _refuse_unsupported(config)
    c = {**DEFAULTS, **config}
    widths = tuple(int(factor * c["model_channels"]) for factor in c["channel_mult"])
    factors = set(c["attention_resolutions"])
    kwargs = {
        "image_size": c["image_size"],
        "widths": widths,
        "time_width": c["model_channels"],
        "blocks_per_level": c["num_res_blocks"],
        "attention_levels": tuple(i for i in range(len(widths)) if 2**i in factors),
        "num_heads": _heads(c, widths),
        "scale_shift": bool(c["use_scale_shift_norm"]),
        "resample_in_blocks": bool(c["resblock_updown"]),
        "attention_scale": "query" if c["use_spatial_transformer"] else "both",
        **channels(c["in_channels"], c["out_channels"]),
    }
    if c["use_spatial_transformer"]:
        kwargs["condition"] = "label_context" if c["n_classes"] else "context"
        kwargs["context_width"] = c["context_dim"]
        kwargs["transformer_depth"] = c["transformer_depth"]
        if c["n_classes"]:  # the last row of the ClassEmbedder is the null class
            kwargs |= {"num_classes": c["n_classes"] - 1, "null_class": True}
    elif c["num_classes"]:
        kwargs |= condition_on_labels(c["num_classes"])
    check(UNet(**kwargs))
    return kwargs


def guided_config(flags: Mapping[str, Any]) -> dict[str, Any]:
    """`UNetModel`'s arguments of guided-diffusion's flags, whose defaults are filled in.

    There `attention_resolutions` ("32,16,8") are sides of the image, and an empty `channel_mult`
    goes by `image_size`. Flags of the diffusion process are not read, but `predict_xstart` is
    refused.
    """
    size = flags["image_size"]
    mult = flags.get("channel_mult", "")
    if not mult and size not in GUIDED_MULTIPLIERS:
        raise InputError(
            f"guided-diffusion: image_size={size} has no channel_mult of its own; give one"
        )
    if flags.get("predict_xstart"):
        raise InputError("guided-diffusion: predict_xstart=True; expected a network of eps")
    sides = [int(side) for side in str(flags.get("attention_resolutions", "16,8")).split(",")]
    return {
        "image_size": size,
        "in_channels": 3,
        "model_channels": flags["num_channels"],
        "out_channels": 6 if flags.get("learn_sigma") else 3,
        "num_res_blocks": flags["num_res_blocks"],
        "attention_resolutions": tuple(size // side for side in sides),
        "channel_mult": tuple(float(part) for part in mult.split(","))
        if mult
        else GUIDED_MULTIPLIERS[size],
        "num_classes": GUIDED_CLASSES if flags.get("class_cond") else None,
        "num_heads": flags.get("num_heads", 4),
        "num_head_channels": flags.get("num_head_channels", -1),
        "num_heads_upsample": flags.get("num_heads_upsample", -1),
        "use_scale_shift_norm": flags.get("use_scale_shift_norm", True),
        "resblock_updown": flags.get("resblock_updown", False),
        "use_new_attention_order": flags.get("use_new_attention_order", False),
    }


def entries(config: Mapping[str, Any], *, prefix: str = "", averaged: bool = False) -> list[Entry]:
    """Where each parameter of `UNet(**module_kwargs(config))` comes from.

    `prefix` is put before every key (`LATENT_PREFIX`, or nothing). `averaged`: from the moving
    average that a latent-diffusion checkpoint keeps beside, its names without dots.
    """
    unet = UNet(**module_kwargs(config))
    found = []
    for path, shape in parameter_shapes(unet).items():
        module, leaf, make = torch_leaf(path, shape)
        if module == "label_embed" and unet.condition == "label_context":
            found.append(Entry(path, ("cond_stage_model.embedding.weight",)))
            continue
        name, part = source(unet, module)
        if part is not None:
            heads = _heads_of(unet, module)
            by_head = not config.get("use_new_attention_order", False)
            make = partial(third, index=part, heads=heads, by_head=by_head, bias=leaf == "bias")
        key = f"{name}.{leaf}"
        if averaged:
            key = "model_ema." + f"diffusion_model.{key}".replace(".", "")
        found.append(Entry(path, (key if averaged else prefix + key,), make))
    return found


def ignored(
    config: Mapping[str, Any], *, prefix: str = "", averaged: bool = False
) -> tuple[str, ...]:
    """Patterns of keys that `entries` of the same arguments leaves out."""
    one_token = module_kwargs(config).get("condition") == "label_context"
    dead = (DEAD_AVERAGED if averaged else DEAD) if one_token else ()
    if not prefix and not averaged:
        return dead
    return (*BESIDE, *dead, f"{LATENT_PREFIX}*" if averaged else "model_ema.*")


def third(weight, *, index: int, heads: int, by_head: bool, bias: bool) -> np.ndarray:
    """Queries (index 0), keys or values of a joint `qkv` weight [3C, C, 1] or bias [3C].

    Its rows run over [heads, 3, C / heads] (`by_head`, the legacy order) or [3, heads, ...].
    """
    rows = weight.reshape(weight.shape[0], -1)
    if len(rows) % (3 * heads):
        return weight  # `fill` reports the shape
    split = rows.reshape(*((heads, 3) if by_head else (3, heads)), -1, rows.shape[1])
    own = (split[:, index] if by_head else split[index]).reshape(-1, rows.shape[1])
    return own[:, 0] if bias else own.T


def source(unet: UNet, module: str) -> tuple[str, int | None]:
    """`UNetModel`'s name of a module, given its path here; 0, 1, 2 for a q, k, v joined there."""
    if module in WHOLE:
        return WHOLE[module], None
    block, *inner = module.split("/")
    side, level, kind, index = split_block(block)
    place = _place(unet, side, level, kind, index)
    if kind == "resample" and not inner:
        return f"{place}.{'op' if side == 'down' else 'conv'}", None
    if kind != "attn":
        return f"{place}.{RESIDUAL[inner[0]]}", None
    if unet.context_width is None:  # SelfAttention: norm, attn/q, attn/k, attn/v, attn/out
        leaf = inner[-1]
        if leaf in ("q", "k", "v"):
            return f"{place}.qkv", "qkv".index(leaf)
        return f"{place}.{'proj_out' if leaf == 'out' else leaf}", None
    return ".".join([place, *transformer_names(inner, SEGMENTS)]), None


def _place(unet: UNet, side: str, level: int, kind: str, index: int) -> str:
    """The numbered place of a block: blocks of a level, then its resampling, in call order."""
    blocks, last = unet.blocks_per_level, len(unet.widths) - 1
    if side == "mid":
        return f"middle_block.{1 if kind == 'attn' else 2 * index}"
    if side == "down":
        number = 1 + level * (blocks + 1) + (blocks if kind == "resample" else index)
        return f"input_blocks.{number}.{int(kind == 'attn')}"
    number = (last - level) * (blocks + 1) + (blocks if kind == "resample" else index)
    after = 1 + (level in unet.attention_levels)
    return f"output_blocks.{number}.{after if kind == 'resample' else int(kind == 'attn')}"


def _heads(c: Mapping[str, Any], widths: tuple[int, ...]) -> int | tuple[int, ...]:
    width = c["num_head_channels"]
    if width != -1:
        return tuple(max(1, channels // width) for channels in widths)
    if c["num_heads"] == -1:
        raise InputError("UNetModel: give num_heads or num_head_channels")
    return c["num_heads"]


def _heads_of(unet: UNet, module: str) -> int:
    # The middle's level -1 is the last one's number of heads, which it has.
    return at_level(unet.num_heads, split_block(module.split("/")[0])[1])


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    missing = [field for field in REQUIRED if field not in config]
    if missing:
        raise InputError(f"UNetModel: {', '.join(missing)} missing")
    unknown = sorted(set(config) - {*REQUIRED, *DEFAULTS, *FIXED, *IRRELEVANT})
    if unknown:
        raise InputError(f"UNetModel: unknown arguments {', '.join(unknown)}")
    heads = config.get("num_heads", -1)
    allowed = {field: (value,) for field, value in FIXED.items()}
    allowed |= {"num_heads_upsample": (-1, heads)}
    for field, values in allowed.items():
        if config.get(field, values[0]) not in values:
            raise InputError(
                f"UNetModel: {field}={config[field]!r} is not supported; expected {values[-1]!r}"
            )
    if config.get("use_spatial_transformer") and not config.get("context_dim"):
        raise InputError("UNetModel: use_spatial_transformer needs a context_dim")
    if config.get("use_spatial_transformer") and config.get("num_classes"):
        raise InputError("UNetModel: num_classes together with a context is not supported")

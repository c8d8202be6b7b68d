"""Paths of a `models.unet.UNet`'s parameters, as PyTorch code bases name and shape them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.weights.mapping import conv

# One part of a path here -> there, where they differ.
SEGMENTS = {
    "embed": "time_emb_proj",
    "shortcut": "conv_shortcut",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
    "ff_in": "ff.net.0.proj",
    "ff_out": "ff.net.2",
}


def torch_leaf(path: str, shape: tuple[int, ...]) -> tuple[str, str, Callable | None]:
    """(module path, torch's name of the leaf, how to make it) of a parameter's path and shape."""
    module, _, leaf = path.rpartition("/")
    if leaf == "kernel":
        return module, "weight", conv if len(shape) == 4 else matrix
    return module, "bias" if leaf == "bias" else "weight", None


def matrix(weight) -> np.ndarray:
    """A Linear weight [out, in], or that of a 1 x 1 convolution [out, in, 1...], as [in, out]."""
    return weight.reshape(weight.shape[0], -1).T


def split_block(name: str) -> tuple[str, int, str, int]:
    """The parts of a block's name: ("up", 2, "attn", 1) of "up_2_attn_1".

    The middle's level is -1; an index left out is 0.
    """
    match = re.fullmatch(r"(down|mid|up)(?:_(\d+))?_(res|attn|resample)(?:_(\d+))?", name)
    if match is None:
        raise InputError(f"{name!r} is no block of a UNet")
    side, level, kind, index = match.groups()
    return side, -1 if level is None else int(level), kind, int(index or 0)


def transformer_names(inner: list[str], segments: Mapping[str, str]) -> list[str]:
    """Parts of a path inside a block, renamed; "block_0" is "transformer_blocks.0"."""
    return [
        segments.get(part, re.sub(r"^block_(\d+)$", r"transformer_blocks.\1", part))
        for part in inner
    ]


def channels(inputs: int, outputs: int) -> dict[str, Any]:
    """`channels` and `learn_variance` of a U-Net; InputError unless outputs are 1 or 2 x inputs."""
    if outputs not in (inputs, 2 * inputs):
        raise InputError(
            f"in_channels={inputs}, out_channels={outputs}: a denoiser gives as many channels as "
            "it takes, or twice as many with a learned variance"
        )
    return {"channels": inputs, "learn_variance": outputs == 2 * inputs}


def condition_on_labels(rows: int) -> dict[str, Any]:
    """Labels added to the time embedding, from a table of `rows`; which is null is not known."""
    return {"condition": "label", "num_classes": rows, "null_class": False}

"""facebookresearch/DiT: state dicts of the released `.pt` files and of its train.py (EMA)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.models.dit import DIT_SIZES, sincos_2d
from mpqdiff.weights.mapping import Entry
from mpqdiff.weights.torch_layers import convolution, learns_variance, linear

# The position table is fixed; `describe` checks that it is the one that our model computes.
IGNORED = ("pos_embed",)
HEADS = {(size["depth"], size["width"]): size["num_heads"] for size in DIT_SIZES.values()}


def describe(state: Mapping[str, np.ndarray], given: Mapping[str, Any]) -> dict[str, Any]:
    """The model's sizes, read from the shapes of its tensors.

    The number of heads leaves no trace there: it is known for the paper's sizes, for others it is
    `given["num_heads"]`. Raises InputError without it, when a tensor that tells a size is missing
    or shaped otherwise, or when the position table is not the fixed one.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        (table,) = state["pos_embed"]
        rows, _ = state["y_embedder.embedding_table.weight"].shape
        (outputs,) = state["final_layer.linear.bias"].shape
        (hidden,) = state["blocks.0.mlp.fc1.bias"].shape
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"no state dict of facebookresearch/DiT: {error}; expected x_embedder.proj.weight "
            "[D, C, p, p], pos_embed [1, N, D], y_embedder.embedding_table.weight, "
            "final_layer.linear.bias and blocks.0.mlp.fc1.bias"
        ) from error
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    grid = round(len(table) ** 0.5)
    if table.shape != (grid**2, width) or not np.allclose(
        np.asarray(table, np.float32),
        sincos_2d(grid, width),
        atol=1e-3,  # float16 rounds to 5e-4
    ):
        raise InputError(
            f"pos_embed {table.shape} is not the fixed sine-cosine table of a square grid, which "
            "is what the model computes; a trained table is not supported"
        )
    heads = HEADS.get((depth, width), given.get("num_heads"))
    if not isinstance(heads, int) or heads < 1:
        raise InputError(
            f"a DiT of depth {depth} and width {width} is none of the paper's, and weights do not "
            'tell the number of heads: write {"num_heads": ...} to a config.json beside the file'
        )
    return {
        "image_size": grid * patch,
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "num_classes": rows - 1,  # the last row is the null class
        "mlp_ratio": hidden / width,
        "learn_variance": learns_variance(channels, outputs // patch**2),
    }


def module_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.dit.DiT`: what `describe` found."""
    return dict(config)


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Where each parameter comes from. Fused qkv rows are in the order [3, heads, D/heads], which
    is ours."""
    found = [
        *convolution("patch_embed", "x_embedder.proj"),
        *linear("t_embed/fc1", "t_embedder.mlp.0"),
        *linear("t_embed/fc2", "t_embedder.mlp.2"),
        Entry("label_embed/embedding", ("y_embedder.embedding_table.weight",)),
        *linear("final_adaln", "final_layer.adaLN_modulation.1"),
        *linear("final", "final_layer.linear"),
    ]
    for index in range(config["depth"]):
        ours, theirs = f"block_{index}", f"blocks.{index}"
        found += linear(f"{ours}/adaln", f"{theirs}.adaLN_modulation.1")
        for part in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"):
            found += linear(f"{ours}/{part}", f"{theirs}.{part.replace('/', '.')}")
    return found

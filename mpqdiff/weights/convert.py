"""Weights of another code base as a file of ours: every key accounted for, or nothing written."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from mpqdiff import models
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.weights import (
    compvis,
    diffusers_dit,
    diffusers_pixart,
    diffusers_unet,
    diffusers_vae,
    facebook_dit,
    mapping,
)
from mpqdiff.weights.hub import download
from mpqdiff.weights.source import Source, open_source
from mpqdiff.weights.store import initialise


class Converter(NamedTuple):
    """How one kind of source fills one of our models.

    `ignored(config)` are patterns of keys without a use; `describe(state, config)` finds the sizes
    where no config.json has to tell them; `note` is for people.
    """

    model: str
    module_kwargs: Callable[[Mapping[str, Any]], dict[str, Any]]
    entries: Callable[[Mapping[str, Any]], list[mapping.Entry]]
    ignored: Callable[[Mapping[str, Any]], Iterable[str]]
    describe: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], dict[str, Any]] | None = None
    note: str = ""


CONVERTERS = {
    "facebook_dit": Converter(
        "dit",
        facebook_dit.module_kwargs,
        facebook_dit.entries,
        lambda config: facebook_dit.IGNORED,
        facebook_dit.describe,
    ),
    "diffusers_dit": Converter(
        "dit",
        diffusers_dit.module_kwargs,
        diffusers_dit.entries,
        lambda config: diffusers_dit.IGNORED,
        note="computes what diffusers computes; for weights that facebookresearch/DiT trained, "
        "kind diffusers_dit_as_trained computes what they were trained with",
    ),
    "diffusers_dit_as_trained": Converter(
        "dit",
        diffusers_dit.trained_kwargs,
        diffusers_dit.entries,
        lambda config: diffusers_dit.IGNORED,
    ),
    "diffusers_pixart": Converter(
        "pixart",
        diffusers_pixart.module_kwargs,
        diffusers_pixart.entries,
        lambda config: diffusers_pixart.IGNORED,
    ),
    "diffusers_vae": Converter(
        "autoencoder_kl",
        diffusers_vae.module_kwargs,
        diffusers_vae.entries,
        lambda config: diffusers_vae.IGNORED,
    ),
    "diffusers_unet": Converter(
        "unet",
        diffusers_unet.module_kwargs,
        diffusers_unet.entries,
        lambda config: diffusers_unet.IGNORED,
    ),
    "guided_diffusion": Converter("unet", compvis.module_kwargs, compvis.entries, compvis.ignored),
    "latent_diffusion": Converter(
        "unet",
        compvis.module_kwargs,
        partial(compvis.entries, prefix=compvis.LATENT_PREFIX),
        partial(compvis.ignored, prefix=compvis.LATENT_PREFIX),
    ),
    "latent_diffusion_averaged": Converter(
        "unet",
        compvis.module_kwargs,
        partial(compvis.entries, prefix=compvis.LATENT_PREFIX, averaged=True),
        partial(compvis.ignored, prefix=compvis.LATENT_PREFIX, averaged=True),
    ),
}
# What a source is: by its config.json's class (and norm_type, where one class had two uses), or by
# a key that it must have.
CLASSES = {
    "DiTTransformer2DModel": "diffusers_dit",
    "Transformer2DModel ada_norm_zero": "diffusers_dit",
    "PixArtTransformer2DModel": "diffusers_pixart",
    "Transformer2DModel ada_norm_single": "diffusers_pixart",
    "AutoencoderKL": "diffusers_vae",
    "UNet2DModel": "diffusers_unet",
    "UNet2DConditionModel": "diffusers_unet",
}
SIGNS = {  # the first that is there
    "y_embedder.embedding_table.weight": "facebook_dit",
    "model_ema.num_updates": "latent_diffusion_averaged",
    "model.diffusion_model.input_blocks.0.0.weight": "latent_diffusion",
    "input_blocks.0.0.weight": "guided_diffusion",
}
# Attention as diffusers named it until version 0.17.
OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def convert(source: str, out: str | Path, *, kind: str = "", hub: bool = False) -> str:
    """Write `source` (a file or folder; with `hub` a repository's name) to `out`, a .safetensors
    file that `weights.load` reads, and a JSON description beside it. Returns what became of the
    source's keys. `kind`: one of CONVERTERS, where the source should not be asked.

    Raises InputError, with nothing written, when the source is damaged, of another architecture,
    or holds values that are not finite.
    """
    out = Path(out)
    _check_out(out)
    opened = open_source(download(source) if hub else source)
    if opened.path.resolve() == out.resolve():
        raise InputError(f"--out={out} is the source itself: name another file")
    try:
        kind = kind or detect(opened)
        if kind not in CONVERTERS:
            raise unknown_name("converter", kind, CONVERTERS)
        model, params, coverage = filled(opened, CONVERTERS[kind])
    except InputError as error:
        raise InputError(f"source {source}: {error}") from error
    record = {
        "model": model,
        "source": str(source),
        "kind": kind,
        "parameters": sum(leaf.size for leaf in params.values()),
        "tensors_used": coverage.used,
        "tensors_left_out": list(coverage.left_out),
    }
    write(out, params, record)
    note = CONVERTERS[kind].note
    return f"{out}: {kind}, {record['parameters']} parameters; {coverage.line()}" + (
        f". Note: {note}" if note else ""
    )


def detect(opened: Source) -> str:
    """The kind of a source. Raises InputError when neither its config nor its keys tell."""
    name = opened.config.get("_class_name", "")
    if name:
        for known in (name, f"{name} {opened.config.get('norm_type')}"):
            if known in CLASSES:
                return CLASSES[known]
        raise unknown_name("class in config.json:", name, {word.split()[0] for word in CLASSES})
    for key, kind in SIGNS.items():
        if key in opened.state:
            return kind
    shown = ", ".join(sorted(opened.state)[:4])
    raise InputError(
        f"cannot tell what this is: no config.json with a _class_name beside it, and keys such as "
        f"{shown}; known: {', '.join(CONVERTERS)}"
    )


def filled(
    opened: Source, converter: Converter
) -> tuple[dict[str, Any], dict[str, np.ndarray], mapping.Coverage]:
    """(model description, {path: array}, coverage). Raises InputError on anything that does not
    fit."""
    state, config = opened.state, opened.config
    if converter.describe:
        config = converter.describe(state, config)
    elif not config:
        raise InputError(
            "these weights do not tell their model's arguments: write them to a config.json beside"
        )
    if "_class_name" in config:
        state = state.renamed(_modern)
    model = {"name": converter.model, "kwargs": converter.module_kwargs(config)}
    module = models.build(model["name"], **model["kwargs"])
    made = jax.eval_shape(lambda key: initialise(module, key), jax.random.key(0))
    flat: dict[str, Any] = traverse_util.flatten_dict(made, sep="/")
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    params, coverage = mapping.fill(
        state, converter.entries(config), shapes, ignored=converter.ignored(config)
    )
    return model, params, coverage


def _modern(key: str) -> str:
    for old, new in OLD_NAMES.items():
        key = key.replace(old, new)
    return key


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise InputError(f"--out={out}: expected a file name ending in .safetensors")
    if not out.parent.is_dir():
        raise InputError(f"--out={out}: there is no folder {out.parent}")
    if out.is_dir():
        raise InputError(f"--out={out} is a folder: name a file")


def write(out: Path, params: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """`out` and the JSON beside it, both or neither. `params` is emptied: each tensor is let go
    once it is on disk."""
    partial, described = (out.with_name(f".{out.name}{end}.partial") for end in ("", ".json"))
    try:
        described.write_text(json.dumps(record, indent=1) + "\n")
        _stream(partial, params, {"model": json.dumps(record["model"])})
        os.replace(partial, out)
        os.replace(described, out.with_suffix(".json"))
    finally:
        partial.unlink(missing_ok=True)
        described.unlink(missing_ok=True)


def _stream(path: Path, params: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """The safetensors format, float32: eight bytes for the header's length, the header with every
    tensor's place, the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, leaf in params.items():
        start, end = end, end + 4 * leaf.size
        header[name] = {"dtype": "F32", "shape": leaf.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in list(params):
            np.ascontiguousarray(params.pop(name), "<f4").tofile(file)

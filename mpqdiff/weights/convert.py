"""Weights of another code base as a file of ours: every key accounted for, or nothing written."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import prod
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
    folder,
    mapping,
    tensors,
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
    "diffusers_vq": Converter(
        "vq_model",
        diffusers_vae.vq_kwargs,
        diffusers_vae.vq_entries,
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
    "VQModel": "diffusers_vq",
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


class Filling(NamedTuple):
    """A model as a source fills it: its description, the shapes of its parameters by path, and the
    parameters one by one, each made when it is asked for."""

    model: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tensors: Iterator[tuple[str, np.ndarray]]
    coverage: mapping.Coverage


def convert(source: str, out: str | Path, *, kind: str = "", hub: bool = False) -> str:
    """Write `source` (a file or folder; with `hub` a repository's name) to `out`, which
    `weights.load` reads. Returns what became of the source's keys.

    `out`: a name ending in .safetensors (beside it comes a JSON description), or in "/" (a folder
    with an Orbax checkpoint and the description). `kind`: one of CONVERTERS, where the source
    should not be asked. The file is written tensor by tensor; Orbax takes all of them at once.
    Raises InputError, with nothing written, when the source is damaged, of another architecture,
    or holds values that are not finite.
    """
    as_folder, out = str(out).endswith("/"), Path(out)
    _check_out(out, as_folder)
    opened = open_source(download(source) if hub else source)
    if opened.path.resolve() == out.resolve():
        raise InputError(f"--out={out} is the source itself: name another file")
    try:
        kind = kind or detect(opened)
        if kind not in CONVERTERS:
            raise unknown_name("converter", kind, CONVERTERS)
        found = filled(opened, CONVERTERS[kind])
        record = {
            "model": found.model,
            "source": str(source),
            "kind": kind,
            "parameters": sum(map(prod, found.shapes.values())),
            "tensors_used": found.coverage.used,
            "tensors_left_out": list(found.coverage.left_out),
        }
        (write_folder if as_folder else write)(out, found, record)
    except InputError as error:
        raise InputError(f"source {source}: {error}") from error
    note = CONVERTERS[kind].note
    return f"{out}: {kind}, {record['parameters']} parameters; {found.coverage.line()}" + (
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


def filled(opened: Source, converter: Converter) -> Filling:
    """Raises InputError on names that do not fit; making the tensors raises what `mapping.make`
    does."""
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
    entries = list(converter.entries(config))
    coverage = mapping.match(state, entries, shapes, ignored=converter.ignored(config))
    return Filling(model, shapes, mapping.make(state, entries, shapes), coverage)


def _modern(key: str) -> str:
    for old, new in OLD_NAMES.items():
        key = key.replace(old, new)
    return key


def _check_out(out: Path, as_folder: bool) -> None:
    if not as_folder and out.suffix != ".safetensors":
        raise InputError(
            f"--out={out}: expected a file name ending in .safetensors, or a folder's ending in / "
            "(Orbax)"
        )
    if not out.parent.is_dir():
        raise InputError(f"--out={out}: there is no folder {out.parent}")
    if as_folder and out.exists():
        raise InputError(f"--out={out}/ is there already: delete it or name another folder")
    if out.is_dir():
        raise InputError(f"--out={out} is a folder: name a file")


def write(out: Path, found: Filling, record: dict[str, Any]) -> None:
    """`out` and the JSON beside it, both or neither, float32."""
    partial, described = (out.with_name(f".{out.name}{end}.partial") for end in ("", ".json"))
    layouts = {path: tensors.Layout(shape) for path, shape in found.shapes.items()}
    try:
        described.write_text(json.dumps(record, indent=1) + "\n")
        tensors.write(partial, layouts, found.tensors, {"model": json.dumps(record["model"])})
        os.replace(partial, out)
        os.replace(described, out.with_suffix(".json"))
    finally:
        partial.unlink(missing_ok=True)
        described.unlink(missing_ok=True)


def write_folder(out: Path, found: Filling, record: dict[str, Any]) -> None:
    """The folder `out`, whole or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        # Orbax would copy a view, such as a transposed kernel, and keep both.
        params = {path: np.ascontiguousarray(value) for path, value in found.tensors}
        folder.save(partial, params, record)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

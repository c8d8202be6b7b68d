"""Weights as safetensors (float16 or float32 on disk, float32 in memory) with their own model.

The file's metadata holds the model's name and arguments, so a weights file is enough to rebuild
the network. A folder that `convert` wrote with Orbax serves as well (`folder`). Embedded files live
in `zoo/`, each with a model card of the same name.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mpqdiff import models
from mpqdiff.errors import InputError
from mpqdiff.models import named
from mpqdiff.weights import folder, tensors

ZOO = Path(__file__).parent / "zoo"


def save(path: Path, params, *, model: dict, dtype=np.float16) -> None:
    """Write `params` (a nested dict of arrays) as `dtype`, atomically.

    `model` is `{"name": ..., "kwargs": {...}}`. InputError when a value is not finite in `dtype`.
    """
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    with np.errstate(over="ignore"):  # an overflow is reported below, by name
        # Contiguous: safetensors writes a view's memory as it lies.
        stored = {name: np.ascontiguousarray(leaf, dtype) for name, leaf in flat.items()}
    bad = [name for name, leaf in stored.items() if not np.isfinite(leaf).all()]
    if bad:
        raise InputError(f"{bad[0]} is not finite as {np.dtype(dtype).name}: nothing was written")
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    save_file(stored, partial, metadata={"model": json.dumps(model)})
    os.replace(partial, path)


def load(source: str, *, own: str = ""):
    """(module, params, model description) of a zoo name, a safetensors file, or a folder that
    `convert` wrote.

    `own` is the one "package.module:ClassName" that may be imported for the file's model: a name
    in a file alone runs no code. Raises InputError when the file is missing, cut short, names no
    model, an unknown or another one, holds NaN, or does not fit its model.
    """
    path = ZOO / f"{source}.safetensors"
    if not path.exists():
        path = Path(source)
    if path.is_dir():
        flat, record = folder.load(path)
        said = record.get("model") if isinstance(record, dict) else record
    elif path.is_file():
        flat, said = _file(path)
    else:
        known = sorted({file.stem for file in ZOO.glob("*.safetensors")} - {"fashion_classifier"})
        raise InputError(
            f"weights {source!r}: no such file; embedded weights: {', '.join(known) or 'none'}; "
            "others are made by mpqdiff convert or mpqdiff train"
        )
    try:
        model: Any = said
        name, kwargs = model["name"], dict(model["kwargs"])
        own_model = named.is_named(name)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"weights {path}: the metadata's model is {said!r}, expected "
            '{"name": ..., "kwargs": {...}}'
        ) from error
    if own_model and name != own:
        raise InputError(
            f"weights {path}: they are for {name!r}, code that a file may not choose to run: set "
            f"config.model.name to it if it is yours (it is {own or 'not given'!r})"
        )
    module = models.build(name, **kwargs)
    check(module, flat, str(path))
    return module, traverse_util.unflatten_dict(flat, sep="/"), model


def _file(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    """({name: float32 array}, what the metadata says of the model), read tensor by tensor."""
    try:
        names, metadata = tensors.describe(path)
        flat = {name: tensors.read(path, name).astype(np.float32, copy=False) for name in names}
    except (SafetensorError, OSError, TypeError) as error:
        raise InputError(f"weights {path}: cut short or damaged ({error})") from error
    if "model" not in metadata:
        raise InputError(
            f"weights {path}: the file's metadata names no model; save it with mpqdiff.weights.save"
        )
    try:
        return flat, json.loads(metadata["model"])
    except ValueError:
        return flat, metadata["model"]


def initialise(module, key):
    """Random parameters of a module; `key` is consumed.

    A module that is not a denoiser of images with labels offers its `example_inputs()`.
    """
    if hasattr(module, "example_inputs"):
        return jax.jit(module.init)(key, *module.example_inputs())["params"]
    size, channels = module.image_size, module.channels
    x_t = jnp.zeros((1, size, size, channels))
    row = jnp.zeros((1,), jnp.int32)
    return jax.jit(module.init)(key, x_t, row, row)["params"]


def check(module, got: dict, where: str) -> None:
    """InputError unless `got` ({"path/of/leaf": array}) has exactly the module's leaves and
    shapes, all finite."""
    shapes = jax.eval_shape(lambda key: initialise(module, key), jax.random.key(0))
    expected: dict[str, Any] = traverse_util.flatten_dict(shapes, sep="/")
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or extra:
        raise InputError(
            f"weights {where}: missing {missing or 'none'}, unexpected {extra or 'none'}"
        )
    for name, leaf in got.items():
        if leaf.shape != expected[name].shape:
            raise InputError(
                f"weights {where}: {name} has shape {leaf.shape}, the model needs "
                f"{expected[name].shape}"
            )
        if not np.isfinite(leaf).all():
            raise InputError(f"weights {where}: {name} holds NaN or infinity")

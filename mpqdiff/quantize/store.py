"""A quantised model on disk: bit-packed weights, scales, float leaves and the activation table.

One safetensors file. Every width from 2 to 8 is bit-packed (`ceil(n b / 8)` bytes); the plan
travels in the metadata, so that the file can be opened on its own. Column sums are not stored.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError

from mpqdiff import plan as plans
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan
from mpqdiff.quantize.activations import Table
from mpqdiff.quantize.numerics import column_sums
from mpqdiff.quantize.pack import pack_bits, unpack_bits
from mpqdiff.sites import Site
from mpqdiff.weights import tensors as files


def decision(plan: Plan) -> dict:
    """The plan without what led to it: equal decisions give equal files."""
    bare = replace(
        plan,
        system="",
        budgets={},
        predicted={},
        provenance={},
        objective=None,
        bound=None,
        gap=None,
    )
    return plans.to_json(bare)


# Of one tensor in a safetensors header, besides its name: dtype, two sizes, two offsets.
_ENTRY_BYTES = 96


def header_bytes(plan: Plan, sites: Sequence[Site], float_params) -> int:
    """At most how many bytes of the file are not tensors, for any widths of the planned sites.

    A budget of file bytes pays for this too; offsets and shapes of fewer digits take less.
    """
    held = [site.path for site in sites if not site.repeated]
    names = [f"float/{name}" for name in traverse_util.flatten_dict(float_params, sep="/")]
    names += [f"steps/{name}" for name in Table._fields]
    names += [f"sites/{path}/{leaf}" for path in held for leaf in ("qvalue", "scale", "bias")]
    shapes = {path: [10**6, 10**6, False] for path in held}
    # JSON inside JSON: every quotation mark is escaped.
    metadata = [json.dumps(json.dumps(body)) for body in (decision(plan), shapes)]
    text = sum(map(len, names)) + sum(map(len, metadata))
    return text + _ENTRY_BYTES * len(names) + 64


def save(
    path: Path,
    plan: Plan,
    tensors: dict[str, dict] | Iterator[tuple[str, dict]],
    float_params,
    steps: Table,
) -> int:
    """Write the file atomically; returns its size in bytes (`file_bytes`).

    `tensors` of `apply.quantize`, or of `apply.stream`: packed one by one as they come.
    """
    stored = {}
    shapes = {}
    for site, entry in tensors.items() if isinstance(tensors, dict) else tensors:
        shapes[site] = list(entry["qvalue"].shape) + ["colsum" in entry]
        stored[f"sites/{site}/qvalue"] = pack_bits(entry["qvalue"], plan.width(site))
        for name in ("scale", "bias"):
            if name in entry:
                stored[f"sites/{site}/{name}"] = np.asarray(entry[name], np.float32)
    flat = traverse_util.flatten_dict(jax.device_get(float_params), sep="/")
    stored |= {f"float/{name}": np.asarray(leaf) for name, leaf in flat.items()}
    stored |= {f"steps/{name}": np.asarray(leaf) for name, leaf in steps._asdict().items()}
    metadata = {"plan": json.dumps(decision(plan)), "shapes": json.dumps(shapes)}
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        size = files.write(partial, files.layout(stored), stored.items(), metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return size


def load_float(path: Path):
    """The float leaves of a file, nested: with `load`, all that `apply.build` needs of a model.

    InputError when damaged or incomplete.
    """
    try:
        names, _ = files.describe(path)
        flat = {
            name.removeprefix("float/"): files.read(path, name)
            for name in names
            if name.startswith("float/")
        }
    except (SafetensorError, OSError) as error:
        raise InputError(f"quantised model {path}: damaged or incomplete ({error})") from error
    return traverse_util.unflatten_dict(flat, sep="/")


def load(path: Path) -> tuple[Plan, dict[str, dict], Table]:
    """(plan, tensors, table) as `quantize` made them; integers stay integers throughout.

    InputError when damaged or incomplete.
    """
    try:
        names, metadata = files.describe(path)
        flat = {name: files.read(path, name) for name in names if not name.startswith("float/")}
        plan = plans.from_json(json.loads(metadata["plan"]), str(path))
        tensors = {}
        for site, (rows, columns, has_colsum) in json.loads(metadata["shapes"]).items():
            packed = flat.pop(f"sites/{site}/qvalue")
            entry = {"qvalue": unpack_bits(packed, plan.width(site), (rows, columns))}
            if has_colsum:
                entry["colsum"] = np.asarray(column_sums(entry["qvalue"]))
            for name in ("scale", "bias"):
                if f"sites/{site}/{name}" in flat:
                    entry[name] = flat[f"sites/{site}/{name}"]
            tensors[site] = entry
        steps = Table(*(jnp.asarray(flat[f"steps/{name}"]) for name in Table._fields))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"quantised model {path}: damaged or incomplete ({error})") from error
    return plan, tensors, steps

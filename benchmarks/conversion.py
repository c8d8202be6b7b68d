"""Peak memory and time of converting, quantising and opening a DiT of random weights.

    python benchmarks/conversion.py [--size XL] [--dir FOLDER] [--bits 4]

Writes a float32 file as facebookresearch/DiT has it (2.7 GB for XL), and runs each step in a
process of its own: to a safetensors file, to an Orbax folder, from the former to a packed file (all
dense and conv sites at --bits, activations at 8, online scales), and from that to the device. A
step's memory is its process's largest resident set; next to it, the same without what importing
takes. The files lie in a folder that is deleted afterwards.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mpqdiff import models, sites, weights
from mpqdiff.denoiser import from_linen
from mpqdiff.models.dit import DIT_SIZES, sincos_2d
from mpqdiff.plan import Plan
from mpqdiff.quantize import apply, store
from mpqdiff.quantize.activations import Table
from mpqdiff.weights import facebook_dit, tensors
from mpqdiff.weights.convert import convert

# DiT at 256 pixels: latents of 32, patches of 2, both halves of the output.
LATENT = dict(image_size=32, channels=4, patch=2, num_classes=1000, learn_variance=True)
SOURCE, CONVERTED, FOLDER, PACKED = "source.safetensors", "converted.safetensors", "orbax", "packed"


def shapes_of(module):
    """The parameters' shapes, nested; nothing is computed."""
    return jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))


def source_layout(size: str) -> dict[str, tensors.Layout]:
    """Every tensor of a released file: the converter's entries, read backwards."""
    module = models.build("dit", **LATENT, **DIT_SIZES[size])
    ours: dict[str, Any] = traverse_util.flatten_dict(shapes_of(module), sep="/")
    orders = {"patch_embed/kernel": (3, 2, 0, 1), "label_embed/embedding": (0, 1)}
    found = {"pos_embed": (1, (32 // 2) ** 2, module.width)}
    for entry in facebook_dit.entries(DIT_SIZES[size]):
        shape = ours[entry.target].shape
        order = orders.get(entry.target, tuple(reversed(range(len(shape)))))
        found[entry.sources[0]] = tuple(shape[axis] for axis in order)
    return {name: tensors.Layout(shape) for name, shape in found.items()}


def write_source(folder: Path, size: str, bits: int) -> None:
    """Random weights, one tensor at a time."""
    del bits
    layouts, rng = source_layout(size), np.random.default_rng(0)

    def drawn():
        for name, one in layouts.items():
            if name == "pos_embed":
                yield name, sincos_2d(32 // 2, one.shape[-1])[None]
            else:
                spread = np.float32(max(one.shape[-1], 1) ** -0.5)
                yield name, spread * rng.standard_normal(one.shape, np.float32)

    tensors.write(folder / SOURCE, layouts, drawn(), {})


def to_file(folder: Path, size: str, bits: int) -> None:
    """Every key accounted for, as safetensors."""
    del size, bits
    convert(str(folder / SOURCE), folder / CONVERTED)


def to_folder(folder: Path, size: str, bits: int) -> None:
    """The same with Orbax."""
    del size, bits
    convert(str(folder / SOURCE), f"{folder / FOLDER}/")


def plan_of(module, bits: int):
    """(plan, sites): all sites with weights at `bits`, activations at 8, scales online."""
    shape = (module.image_size, module.image_size, module.channels)
    shapes = shapes_of(module)
    found, _ = sites.list_sites(from_linen(module), shapes, *sites.example_inputs(shape))
    planned = sites.planned(found)
    chosen = {site.path for site in planned}
    nothing = {"lhs": None, "rhs": None}
    plan = Plan(
        model={"hash": "random"},
        w_bits={site.path: bits if site.path in chosen else None for site in found},
        a_bits={
            site.path: nothing if site.kind == "product" else 8 if site.path in chosen else None
            for site in found
        },
        mode="online",
        groups=((999, 0),),
        timesteps=(999, 0),
        system="uniform",
    )
    return plan, planned


def empty_table(count: int) -> Table:
    """Online scales need none."""
    return Table(jnp.zeros(0, jnp.int32), jnp.zeros((0, count)), jnp.zeros((0, count), jnp.int8))


def quantise(folder: Path, size: str, bits: int) -> None:
    """The converted file as a packed one."""
    del size
    module, params, _ = weights.load(str(folder / CONVERTED))
    plan, planned = plan_of(module, bits)
    pieces = apply.stream(params, planned, plan, [False] * len(planned))
    left = apply.float_leaves(params, planned)
    store.save(folder / PACKED, plan, pieces, left, empty_table(len(planned)))


def open_packed(folder: Path, size: str, bits: int) -> None:
    """The packed file, on the device, with the float weights nowhere."""
    module = models.build("dit", **LATENT, **DIT_SIZES[size])
    _, planned = plan_of(module, bits)
    plan, held, steps = store.load(folder / PACKED)
    left = store.load_float(folder / PACKED)
    model = apply.build(from_linen(module), left, planned, plan, held, steps)
    jax.block_until_ready(model.params)


STEPS = {
    "write random weights": (write_source, SOURCE),
    "convert to safetensors": (to_file, CONVERTED),
    "convert to Orbax": (to_folder, FOLDER),
    "quantise and pack": (quantise, PACKED),
    "open packed": (open_packed, None),
}


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def child(step: str, folder: Path, size: str, bits: int) -> None:
    """One step, then its numbers as JSON."""
    jax.block_until_ready(jnp.zeros(1))
    before, begin = peak_bytes(), time.perf_counter()
    STEPS[step][0](folder, size, bits)
    taken = time.perf_counter() - begin
    print(json.dumps({"seconds": taken, "imported": before, "peak": peak_bytes()}))


def measured(step: str, options, folder: Path) -> dict:
    """The numbers of a step in a fresh process."""
    words = [sys.executable, __file__, "--size", options.size, "--bits", str(options.bits)]
    words += ["--dir", str(folder), "--step", step]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def size_on_disk(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return sum(one.stat().st_size for one in (path, *path.rglob("*")) if one.is_file())


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="XL", choices=list(DIT_SIZES))
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9))
    parser.add_argument("--dir", default=None, help="where the temporary folder goes")
    parser.add_argument("--step", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.step:
        child(options.step, Path(options.dir), options.size, options.bits)
        return
    layouts = source_layout(options.size)
    whole = sum(one.bytes for name, one in layouts.items() if name != "pos_embed")
    print(
        f"DiT-{options.size}/2: {whole // 4:,} parameters, {whole / 2**20:,.0f} MiB of float32; "
        f"W{options.bits}A8; jax {jax.__version__} on {jax.devices()[0].device_kind}"
    )
    print("| step | seconds | on disk, MiB | peak, MiB | of float32 | without imports |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        for step, (_, file) in STEPS.items():
            got = measured(step, options, Path(name))
            disk = f"{size_on_disk(Path(name) / file) / 2**20:,.0f}" if file else "-"
            own = got["peak"] - got["imported"]
            print(
                f"| {step} | {got['seconds']:.1f} | {disk} | {got['peak'] / 2**20:,.0f} | "
                f"{got['peak'] / whole:.2f}x | {own / whole:.2f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()

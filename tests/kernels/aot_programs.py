"""Compile TPU programs on a machine without a TPU and print what they are made of, as JSON.

    python aot_programs.py TOPOLOGY DUMP GROUP...

A process of its own, with the environment that `aot_test.py` gives it: libtpu reads that once,
before jax starts. What a program multiplies is read from the kernels that the compiler was given
(Mosaic's dump, in the folder DUMP), what it holds from the compiled HLO.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from mpqdiff import models, weights
from mpqdiff import sites as site_list
from mpqdiff.denoiser import from_linen
from mpqdiff.diffusion.samplers import ddim, uniform_timesteps
from mpqdiff.diffusion.schedule import linear
from mpqdiff.evaluate import verify
from mpqdiff.kernels import tpu
from mpqdiff.kernels.attention_products import pv, qk
from mpqdiff.kernels.gram import gram
from mpqdiff.kernels.quantize_activations import quantize_activations
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.kernels.row_routing import gather_rows, scatter_rows
from mpqdiff.kernels.weight_only_matmul import weight_only_matmul
from mpqdiff.models import DIT_SIZES
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations, apply
from mpqdiff.quantize.pack import packed_shape

_MATMUL = re.compile(r"tpu\.matmul .* : (.*)")
_ELEMENT = re.compile(r"vector<[\dx]*x(\w+)>")
_CALL = re.compile(r'custom_call_target="tpu_custom_call".*?op_name="([^"]*)"')


def compiled(function, *arguments, planned=()) -> dict:
    """What `function`, compiled for the arguments' devices, multiplies, calls and holds.

    `complaints` are those of `verify` about the sites `planned` as integer.
    """
    dump = Path(sys.argv[2])
    for file in dump.glob("*"):
        file.unlink()
    with tpu.compiling_for_tpu():
        program = jax.jit(function).lower(*arguments).compile()
    products = set()
    for file in dump.glob("*-original.txt"):
        for types in _MATMUL.findall(file.read_text()):
            products.add(" ".join(_ELEMENT.findall(types)))
    text, memory = program.as_text(), program.memory_analysis()
    complaints = verify.check(
        verify.read(program, images=[]), planned, promised_bytes=0, passed_bytes=0
    )
    return {
        "complaints": complaints,
        "calls": _CALL.findall(text),
        "products": sorted(products),
        "arrays": sorted(set(re.findall(r"\b([a-z]+\d+\[[\d,]+\])", text))),
        "loops": [line.split(" while(")[0] for line in text.splitlines() if " while(" in line],
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }


def layer(on, rows, inputs, outputs, bits, *, each=False, zero=False, online=False, **options):
    """`quantized_matmul` and its arguments; `each`: scales by token, `online`: of the kernel's."""
    column = (rows, 1) if each else ()
    arguments = (
        on((rows, inputs), options.pop("x_type", jnp.float32)),
        on(packed_shape((inputs, outputs), bits), jnp.int8),
        None if online else on(column, jnp.float32),
        on(column, jnp.int8) if zero else None,
        on((outputs,), jnp.float32),
        on((outputs,), jnp.int32) if zero else None,
        on((outputs,), jnp.float32),
    )
    run = partial(quantized_matmul, w_bits=bits, implementation="pallas_tpu", **options)
    return run, *arguments


def weight_only(on, rows, inputs, outputs, bits):
    """`weight_only_matmul` of bfloat16 tokens, and its arguments."""
    run = partial(weight_only_matmul, w_bits=bits, implementation="pallas_tpu")
    packed = on(packed_shape((inputs, outputs), bits), jnp.int8)
    return run, on((rows, inputs), jnp.bfloat16), packed, *[on((outputs,), jnp.float32)] * 2


def attention(on, images, heads, queries, keys, width, *, each=False):
    """`qk` and `pv` and their arguments; `each`: scales by image, and a zero point of them."""
    scales = on((images,) if each else (), jnp.float32), on((images,) if each else (), jnp.int8)
    q, k = (on((images, tokens, heads, width), jnp.float32) for tokens in (queries, keys))
    p = on((images, heads, queries, keys), jnp.float32)
    scores, mixed = (partial(run, implementation="pallas_tpu") for run in (qk, pv))
    return (
        (scores, q, k, scales[0], scales[1] if each else None, scales[0]),
        (mixed, p, k, *scales, scales[0]),
    )


def routing(on, images, rows, taken, features, dtype, *, add=False):
    """`gather_rows` and `scatter_rows` and their arguments."""
    x, y = (on((images, count, features), dtype) for count in (rows, taken))
    index = on((images, taken), jnp.int32)
    return (
        (partial(gather_rows, implementation="pallas_tpu"), x, index),
        (partial(scatter_rows, add=add, implementation="pallas_tpu"), x, index, y),
    )


def kernels(on) -> dict:
    """Every kernel and option, at sizes that blocks divide and sizes that nothing divides."""
    quantize = partial(quantize_activations, implementation="pallas_tpu")
    grams = partial(gram, implementation="pallas_tpu")
    scores, mixed = attention(on, 2, 6, 256, 256, 64)
    scores_odd, mixed_odd = attention(on, 3, 5, 601, 77, 36, each=True)
    gathered, scattered = routing(on, 4, 256, 100, 384, jnp.float32)
    gathered_odd, added_odd = routing(on, 3, 49, 33, 131, jnp.bfloat16, add=True)
    gathered_int8, scattered_int8 = routing(on, 3, 49, 33, 131, jnp.int8)
    programs = {
        "w8_gelu": layer(on, 256, 1152, 768, 8, activation="gelu"),
        "w4_zero": layer(on, 256, 1152, 384, 4, zero=True),
        "w2_bfloat16": layer(on, 128, 1152, 384, 2, x_type=jnp.bfloat16),
        "w4_tokens": layer(on, 128, 384, 256, 4, each=True, zero=True, activation="silu"),
        "w4_online": layer(on, 128, 384, 256, 4, online=True),
        "w4_odd": layer(on, 131, 1027, 301, 4),
        "w2_one_row": layer(on, 1, 1152, 384, 2),
        "w4_tiny": layer(on, 5, 9, 3, 4, each=True),
        "w4_only": weight_only(on, 128, 1152, 256, 4),
        "w8_only_odd": weight_only(on, 50, 1027, 133, 8),
        "quantize": (quantize, on((1024, 384), jnp.float32)),
        "quantize_odd": (quantize, on((3, 50, 1027), jnp.bfloat16)),
        "gram": (grams, on((64, 16, 384), jnp.float32)),
        "gram_odd": (grams, on((101, 33, 31), jnp.bfloat16)),
        "qk_w8": scores,
        "pv_w8": mixed,
        "qk_w8_odd": scores_odd,
        "pv_w8_odd": mixed_odd,
        "gather": gathered,
        "scatter": scattered,
        "gather_odd": gathered_odd,
        "scatter_add_odd": added_odd,
        "gather_int8": gathered_int8,
        "scatter_int8": scattered_int8,
    }
    return {name: compiled(*program) for name, program in programs.items()}


def large(on) -> dict:
    """The layers of DiT-XL/2 at 32 images of 256 tokens, a long contraction, and recording."""
    tokens = 32 * 256
    programs = {
        "qkv_w8": layer(on, tokens, 1152, 3456, 8),
        "proj_w4": layer(on, tokens, 1152, 1152, 4),
        "fc1_w4_gelu": layer(on, tokens, 1152, 4608, 4, activation="gelu"),
        "fc2_w8_zero": layer(on, tokens, 4608, 1152, 8, zero=True),
        "fc2_w2_zero": layer(on, tokens, 4608, 1152, 2, zero=True),
        "adaln_w4": layer(on, 32, 1152, 6912, 4),
        "conv_w8": layer(on, 2048, 23040, 1280, 8),
        "longest_w4": layer(on, 2048, 30720, 384, 4),
        "fc2_w4_only": weight_only(on, tokens, 4608, 1152, 4),
        "quantize": (
            partial(quantize_activations, implementation="pallas_tpu"),
            on((tokens, 4608), jnp.float32),
        ),
        "gram": (
            partial(gram, implementation="pallas_tpu"),
            on((1024, 256, 1152), jnp.float32),
        ),
    }
    return {name: compiled(*program) for name, program in programs.items()}


def quantised_dit(size: dict, *, image_size: int, patch: int, steps: int, backend: str):
    """(QuantizedModel of a DiT whose every number is 0, its sampler, its sites, their widths)."""
    module = models.build(
        "dit", image_size=image_size, channels=4, patch=patch, num_classes=10, **size
    )
    shapes = jax.eval_shape(partial(weights.initialise, module), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    denoise = from_linen(module)
    image = (image_size, image_size, 4)
    every, _ = site_list.list_sites(denoise, params, *site_list.example_inputs(image))
    planned = site_list.planned(every)
    bits = {site.path: (4, 8)[i % 2] for i, site in enumerate(planned)}
    kept = uniform_timesteps(1000, steps)
    plan = Plan(
        model={"hash": "zeros"},
        w_bits={site.path: bits.get(site.path) for site in every},
        a_bits={
            site.path: {"lhs": None, "rhs": None}
            if site.kind == "product"
            else 8 * (site.path in bits) or None
            for site in every
        },
        mode="step_table",
        groups=activations.groups(kept, kept, "step_table"),
        timesteps=tuple(kept.tolist()),
        system="test",
    )
    tensors = {}
    for site in planned:
        inputs, outputs = int(np.prod(site.shape[:-1])), site.shape[-1]
        tensors[site.path] = {
            "qvalue": np.zeros((inputs, outputs), np.int8),
            "scale": np.ones(outputs, np.float32),
            "bias": np.zeros(outputs, np.float32),
        }
        if site.path.endswith("fc2"):  # after GELU or SiLU
            tensors[site.path]["colsum"] = np.zeros(outputs, np.int32)
    columns = sum(len(own) for own in activations.columns(planned).values())
    table = activations.Table(
        np.asarray(kept), np.ones((steps, columns), np.float32), np.zeros((steps, columns), np.int8)
    )
    with tpu.compiling_for_tpu():
        model = apply.build(denoise, params, planned, plan, tensors, table, backend=backend)

    def sample(params, x_T, labels):
        return ddim(model.denoise, params, x_T, labels, timesteps=kept, alphas_cumprod=linear(1000))

    held = {site.path: (list(site.shape), bits[site.path]) for site in planned}
    return model, sample, planned, held


def sampler(on, *, size, batch, image_size, patch=2, steps=4, backend="pallas_tpu") -> dict:
    """The sampling program of a quantised DiT on one chip."""
    model, sample, planned, held = quantised_dit(
        size, image_size=image_size, patch=patch, steps=steps, backend=backend
    )
    found = compiled(
        sample,
        jax.tree.map(lambda leaf: on(leaf.shape, leaf.dtype), model.params),
        on((batch, image_size, image_size, 4), jnp.float32),
        on((batch,), jnp.int32),
        planned=planned,
    )
    positions = f"[{(image_size // patch) ** 2},{size['width']}]"
    return found | {"sites": held, "passed_bytes": model.bytes, "positions": positions}


def sharded(devices, *, size, batch, image_size, patch=2, steps=4) -> dict:
    """The same with the batch split over all `devices`: each samples its own images."""
    model, sample, planned, held = quantised_dit(
        size, image_size=image_size, patch=patch, steps=steps, backend="pallas_tpu"
    )
    mesh = Mesh(np.array(devices), ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")

    def on(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    run = jax.shard_map(
        sample, mesh=mesh, in_specs=(whole, split, split), out_specs=split, check_vma=False
    )
    found = compiled(
        run,
        jax.tree.map(lambda leaf: on(leaf.shape, leaf.dtype, whole), model.params),
        on((batch, image_size, image_size, 4), jnp.float32, split),
        on((batch,), jnp.int32, split),
        planned=planned,
    )
    positions = f"[{(image_size // patch) ** 2},{size['width']}]"
    found |= {"sites": held, "passed_bytes": model.bytes, "positions": positions}
    return found | {"devices": len(devices)}


SMALL = {"width": 384, "depth": 2, "num_heads": 6}
XL = DIT_SIZES["XL"]


def main(topology: str, groups: list[str]) -> dict:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    place = SingleDeviceSharding(devices[0])

    def on(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def whole(size, backends, **options):
        return {name: sampler(on, size=size, backend=name, **options) for name in backends}

    both = ("pallas_tpu", "kernels")
    made = {
        "kernels": lambda: kernels(on),
        "large": lambda: large(on),
        "sampler": lambda: whole(SMALL, both[:1], batch=5, image_size=16),
        "xl": lambda: whole(XL, both, batch=32, image_size=32),
        "sharded": lambda: {
            "pallas_tpu": sharded(devices, size=SMALL, batch=len(devices) * 2, image_size=16)
        },
    }
    return {"chip": devices[0].device_kind} | {group: made[group]() for group in groups}


if __name__ == "__main__":
    topology, _, *groups = sys.argv[1:]
    print(json.dumps(main(topology, groups)))

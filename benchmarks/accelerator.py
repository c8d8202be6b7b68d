"""One GPU or TPU in one run: are its kernels right, how fast are they, and does a sampler gain?

    python benchmarks/accelerator.py [--out accelerator.json] [--budget_s 540] [--quick]
                                     [--parts correctness roofline sampling kernels]

Needs jax and this package alone. Results are written after every row, so that a run which is killed
keeps what it has; past the budget no further row is begun, and it is named as left out. A time is
the median over rounds, in each of which every form of a row runs in turn, and ratios are within a
row. `--quick` is for any machine: small sizes, kernels interpreted, times that mean nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpqdiff import models, sites, weights
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.diffusion.samplers import ddim, uniform_timesteps
from mpqdiff.diffusion.schedule import linear
from mpqdiff.errors import InputError
from mpqdiff.kernels.gram import gram
from mpqdiff.kernels.quantize_activations import quantize_activations
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.kernels.weight_only_matmul import weight_only_matmul
from mpqdiff.models import DIT_SIZES
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations, apply, backends
from mpqdiff.quantize.pack import pack

KERNELS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu", "cpu": "pallas_gpu_interpret"}
# Dense peaks of the data sheets, operations a second: (bfloat16, int8), by a part of device_kind.
PEAKS = {
    "H100 PCIe": (756e12, 1513e12),
    "H100": (989e12, 1979e12),
    "H200": (989e12, 1979e12),
    "A100": (312e12, 624e12),
    "TPU v5 lite": (197e12, 394e12),
    "TPU v6 lite": (918e12, 1836e12),
}
# Rows, inputs, outputs. DiT: 32 images of 256 tokens; U-Net: 3 x 3 convolutions as products of
# their patches, at the three sizes of a latent U-Net's feature maps.
SHAPES = {
    "DiT-XL/2 qkv": (8192, 1152, 3456),
    "DiT-XL/2 proj": (8192, 1152, 1152),
    "DiT-XL/2 fc1": (8192, 1152, 4608),
    "DiT-XL/2 fc2": (8192, 4608, 1152),
    "DiT-XL/2 adaln": (32, 1152, 6912),
    "DiT-S/2 qkv": (8192, 384, 1152),
    "DiT-S/2 fc1": (8192, 384, 1536),
    "DiT-S/2 fc2": (8192, 1536, 384),
    "U-Net 32 x 32": (32768, 3456, 384),
    "U-Net 16 x 16": (8192, 5184, 576),
    "U-Net 8 x 8": (2048, 8640, 960),
}
QUICK_SHAPES = {"small": (64, 96, 160), "adaln": (2, 96, 64)}
SCALE = np.float32(0.03)


def compiled(programs: dict[str, tuple]) -> dict[str, tuple]:
    """The same jitted (function, arguments), compiled side by side: that is most of a run."""
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda entry: entry[0].lower(*entry[1]).compile(), programs.values())
        return {n: (p, args) for (n, (_, args)), p in zip(programs.items(), made, strict=True)}


def seconds(forms: dict[str, tuple[Callable, tuple]], *, rounds: int, inner: int) -> dict:
    """Median seconds of one call of each (function, arguments), `inner` of them in one program.

    Every call waits for the one before it, by a barrier: neither may be hoisted or merged, and the
    time to start a program is shared by all.
    """

    def repeated(function):
        def run(x, *rest):
            def body(_, last):
                held, _ = lax.optimization_barrier((x, last))
                out = lax.optimization_barrier(function(held, *rest))
                return out.ravel()[0].astype(jnp.float32)

            return lax.fori_loop(0, inner, body, jnp.float32(0))

        return jax.jit(run)

    programs = compiled({name: (repeated(f), args) for name, (f, args) in forms.items()})
    for program, args in programs.values():
        jax.block_until_ready(program(*args))
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (program, args) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            taken[name].append((time.perf_counter() - start) / inner)
    return {name: float(np.median(values)) for name, values in taken.items()}


def layer_operands(seed: int, rows: int, inputs: int, outputs: int, bits: int, kernel: str):
    """(x bfloat16, packed weight, its scales, bias); the weight transposed for a GPU's kernel."""
    rng = np.random.default_rng(seed)
    limit = (1 << (bits - 1)) - 1
    packed = pack(rng.integers(-limit, limit + 1, (inputs, outputs)).astype(np.int8), bits)
    return (
        jnp.asarray(rng.standard_normal((rows, inputs)), jnp.bfloat16),
        jnp.asarray(np.ascontiguousarray(packed.T)) if "gpu" in kernel else jnp.asarray(packed),
        jnp.asarray(rng.random(outputs) * 0.01 + 0.001, jnp.float32),
        jnp.asarray(rng.standard_normal(outputs), jnp.float32),
    )


def layer(bits: int, implementation: str, turned: bool, *, weight_only=False, online=False):
    """A quantised layer as a function of `layer_operands`: bfloat16 in and out."""

    def run(x, weight, w_scale, bias):
        weight = weight.T if turned else weight
        options = {"w_bits": bits, "implementation": implementation}
        if weight_only:
            return weight_only_matmul(x, weight, w_scale, bias, **options).astype(x.dtype)
        scale = None if online else jnp.asarray(SCALE)
        y = quantized_matmul(x, weight, scale, None, w_scale, None, bias, **options)
        return y.astype(x.dtype)

    return run


def correctness(kernel: str, quick: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Largest differences of every kernel from the definition.

    Integer sums must have none. Elsewhere a hundredth of the largest value is allowed: what one
    integer may move where a token's own scale is divided otherwise by a last bit.
    """
    sizes = [(33, 75, 37)] if quick else [(512, 1152, 768), (131, 1027, 301)]

    def compare(run, *args, allowed=0.01) -> dict:
        found = [
            jax.jit(partial(run, implementation=name))(*args) for name in (kernel, "reference")
        ]
        mine, wanted = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(f)]) for f in found)
        error = np.max(np.abs(mine - wanted), initial=0.0)
        largest = np.max(np.abs(wanted))
        row: dict = {"max_error": float(error), "largest": float(largest)}
        if not error <= allowed * largest:
            row["error"] = f"{error:.3g} of {largest:.3g} from the definition"
        return row

    turned = "gpu" in kernel
    for shape in sizes:
        label = " x ".join(map(str, shape))
        for bits in (8, 4, 2):
            x, weight, w_scale, bias = layer_operands(0, *shape, bits, kernel)
            weight = weight.T if turned else weight
            ones = jnp.ones_like(w_scale)
            exact = jnp.round(x.astype(jnp.float32) * 40)  # scale 1: outputs are the sums
            sums = partial(quantized_matmul, w_bits=bits)
            one = (exact, weight, jnp.float32(1), None, ones, None, None)
            yield f"sums w{bits} {label}", partial(compare, sums, *one, allowed=0)
            own = (x, weight, None, None, w_scale, None, bias)
            yield f"own scales w{bits} {label}", partial(compare, sums, *own)
            only = partial(weight_only_matmul, w_bits=bits, activation="gelu")
            yield f"weight only w{bits} {label}", partial(compare, only, x, weight, w_scale, bias)
        x = layer_operands(1, *shape, 8, kernel)[0]
        yield f"quantise {label}", partial(compare, quantize_activations, x)
        yield f"gram {label}", partial(compare, gram, x[:64].astype(jnp.float32))


def roofline(kernel: str, quick: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Measured copy bandwidth, and rates of XLA's own square products."""
    del kernel
    size, many = (256, 2**16) if quick else (8192, 2**28)
    options = {"rounds": 3 if quick else 7, "inner": 2 if quick else 10}

    def copy():
        x = jnp.zeros(many, jnp.float32)
        taken = seconds({"copy": (lambda x: x + 1, (x,))}, **options)["copy"]
        return {"seconds": taken, "bytes_per_s": 2 * x.nbytes / taken}

    def product(dtype, total):
        x = jnp.ones((size, size), dtype)
        dot = partial(jnp.matmul, preferred_element_type=total)
        taken = seconds({"dot": (dot, (x, x))}, **options)["dot"]
        return {"seconds": taken, "operations_per_s": 2 * size**3 / taken}

    yield "copy", copy
    yield "float32 product", partial(product, jnp.float32, jnp.float32)
    yield "bfloat16 product", partial(product, jnp.bfloat16, jnp.bfloat16)
    yield "int8 product", partial(product, jnp.int8, jnp.int32)


def kernels(kernel: str, quick: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Layer times in microseconds, their rates, and bfloat16's time over each."""

    def row(rows, inputs, outputs):
        x, _, _, bias = layer_operands(0, rows, inputs, outputs, 8, kernel)
        wide = jnp.ones((inputs, outputs), jnp.float32)

        def plain(x, weight, bias):
            return x @ weight + bias

        forms: dict[str, tuple[Callable, tuple]] = {
            "f32": (plain, (x.astype(jnp.float32), wide, bias)),
            "bf16": (plain, (x, wide.astype(jnp.bfloat16), bias.astype(jnp.bfloat16))),
        }
        for name, bits, options in (
            ("w8a8", 8, {}),
            ("w4a8", 4, {}),
            ("w4a16", 4, {"weight_only": True}),
            ("w8a8_online", 8, {"online": True}),
        ):
            for implementation in ("xla", kernel):
                turned = "gpu" in kernel
                operands = layer_operands(0, rows, inputs, outputs, bits, kernel)
                forms[f"{name} {implementation}"] = (
                    layer(bits, implementation, turned, **options),
                    operands,
                )
        taken = seconds(forms, rounds=3 if quick else 7, inner=2 if quick else 20)
        rate = {name: 2 * rows * inputs * outputs / value for name, value in taken.items()}
        ratio = {name: taken["bf16"] / value for name, value in taken.items()}
        return {"seconds": taken, "operations_per_s": rate, "over_bf16": ratio}

    for name, shape in (QUICK_SHAPES if quick else SHAPES).items():
        yield f"{name} {' x '.join(map(str, shape))}", partial(row, *shape)


def held_as_bfloat16(denoise):
    """`denoise` computing in bfloat16 over bfloat16 parameters, float32 at its ends."""

    def run(params, x_t, t, cond):
        out = denoise(params, x_t.astype(jnp.bfloat16), t, cond)
        return Prediction(out.eps.astype(jnp.float32))

    return run


def backend(implementation: str):
    """What `quantize.apply` takes as a back end: weights packed, products by `implementation`,
    returned in the type of their input so that what follows runs in bfloat16 too."""
    turned = "gpu" in implementation

    def hold(qvalue, bits):
        packed = pack(qvalue, bits)
        return np.ascontiguousarray(packed.T) if turned else packed

    def open_(packed, *, bits, shape):
        del shape
        return (packed.T if turned else packed), bits

    def matmul(x, held, *rest, x_bits):
        packed, bits = held
        y = quantized_matmul(
            x, packed, *rest, x_bits=x_bits, w_bits=bits, implementation=implementation
        )
        return y.astype(x.dtype)

    return hold, open_, matmul


def quantised_dit(module, params, w_bits: int, kept, implementation: str):
    """`module` with every planned site at `w_bits` and 8-bit activations, one scale per step."""
    denoise = from_linen(module)
    image = (module.image_size, module.image_size, module.channels)
    every, _ = sites.list_sites(denoise, params, *sites.example_inputs(image))
    planned = [site for site in sites.planned(every) if site.kind != "product"]
    chosen = {site.path for site in planned}
    plan = Plan(
        model={"hash": "random"},
        w_bits={site.path: w_bits if site.path in chosen else None for site in every},
        a_bits={
            site.path: {"lhs": None, "rhs": None}
            if site.kind == "product"
            else (8 if site.path in chosen else None)
            for site in every
        },
        mode="step_table",
        groups=activations.groups(kept, kept, "step_table"),
        timesteps=tuple(kept.tolist()),
        system="benchmark",
    )
    columns = sum(len(own) for own in activations.columns(planned).values())
    shape = len(kept), columns
    table = activations.Table(
        jnp.asarray(kept, jnp.int32), jnp.full(shape, SCALE), jnp.zeros(shape, jnp.int8)
    )
    tensors = apply.quantize(params, planned, plan, table, [False] * len(planned), clip="absmax")
    backends.BACKENDS[f"benchmark_{implementation}"] = partial(backend, implementation)
    model = apply.build(
        denoise, params, planned, plan, tensors, table, backend=f"benchmark_{implementation}"
    )
    left = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params["float"])
    return model.denoise, model.params | {"float": left}


def random_dit(quick: bool):
    """(module, params): a DiT-XL/2 at 256 pixels, or a tiny one, none of its kernels zero."""
    size = {"width": 64, "depth": 2, "num_heads": 4} if quick else DIT_SIZES["XL"]
    image = 8 if quick else 32
    module = models.build(
        "dit", image_size=image, channels=4, patch=2, num_classes=1000, learn_variance=True, **size
    )
    leaves, tree = jax.tree.flatten(weights.initialise(module, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return module, tree.unflatten(noisy)


def sampling(kernel: str, quick: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Images a second of a compiled sampler, bfloat16 against integers, in turn each round."""
    batch, steps, rounds = (2, 2, 2) if quick else (32, 20, 3)

    def everything():
        module, params = random_dit(quick)
        kept = uniform_timesteps(1000, steps)
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        arms = {"bf16": (from_linen(module), low)}
        for bits in (8, 4):
            for name in ("xla", kernel):
                arms[f"w{bits}a8 {name}"] = quantised_dit(module, params, bits, kept, name)
        side = module.image_size
        noise = jax.random.normal(jax.random.key(2), (batch, side, side, 4))
        labels = jnp.arange(batch, dtype=jnp.int32)

        def program(denoise):
            options = {"timesteps": kept, "alphas_cumprod": linear(1000)}
            return jax.jit(partial(ddim, held_as_bfloat16(denoise), **options))

        programs = compiled(
            {name: (program(run), (held, noise, labels)) for name, (run, held) in arms.items()}
        )
        images, taken = {}, {name: [] for name in arms}
        for name, (run, arguments) in programs.items():
            images[name] = np.asarray(run(*arguments))
        for _ in range(rounds):
            for name, (run, arguments) in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(*arguments))
                taken[name].append(time.perf_counter() - start)
        middle = {name: float(np.median(values)) for name, values in taken.items()}
        differ = {
            f"w{bits}a8": float(
                np.abs(images[f"w{bits}a8 {kernel}"] - images[f"w{bits}a8 xla"]).max()
            )
            for bits in (8, 4)
        }
        return {
            "seconds": middle,
            "images_per_s": {name: batch / value for name, value in middle.items()},
            "over_bf16": {name: middle["bf16"] / value for name, value in middle.items()},
            "max_difference_from_xla": differ,
        }

    yield (
        f"{'tiny DiT' if quick else 'DiT-XL/2 256'}, batch {batch}, {steps} DDIM steps",
        everything,
    )


PARTS = {
    "correctness": correctness,
    "roofline": roofline,
    "sampling": sampling,
    "kernels": kernels,
}


def peaks(kind: str) -> dict[str, float]:
    """Data-sheet operations a second of a device, empty where it is not listed."""
    known = next((PEAKS[name] for name in PEAKS if name in kind), None)
    return {} if known is None else dict(zip(("bf16", "int8"), known, strict=True))


def text(part: str, name: str, row: dict, peak: dict[str, float]) -> str:
    """A row as Markdown: a cell for each form, with its share of the data sheet's peak."""
    if "error" in row:
        return f"| {name} | {row['error'].splitlines()[0]} |"
    if part == "correctness":
        return f"| {name} | {row['max_error']:.3g} of {row['largest']:.3g} |"
    if part == "roofline":
        rate = row["bytes_per_s" if "bytes_per_s" in row else "operations_per_s"]
        return f"| {name} | {rate / 1e12:.3g} T/s |"
    cells = [name]
    for form, value in row["seconds"].items():
        cell = f"{form}: {value * 1e6:.0f} us, {row['over_bf16'][form]:.2f}x"
        ceiling = peak.get("int8" if "a8" in form else "bf16") if part == "kernels" else None
        if ceiling and form != "f32":
            cell += f", {row['operations_per_s'][form] / ceiling:.0%}"
        cells.append(cell)
    return "| " + " | ".join(cells) + " |"


def write(path: Path, results: dict) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    os.replace(part, path)


def run(parts: list[str], *, out: Path, budget_s: float, quick: bool) -> dict:
    """Every row of `parts`, printed and written as it comes; a failure is a row too."""
    begin, device = time.perf_counter(), jax.devices()[0]
    kernel, peak = KERNELS[jax.default_backend()], peaks(device.device_kind)
    results: dict = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "kernel": kernel,
        "quick": quick,
        "peak_operations_per_s": peak,
        "rows": {part: {} for part in parts},
        "left_out": [],
    }
    print(f"jax {jax.__version__} on {device.device_kind}, kernels: {kernel}")
    for part in parts:
        print(f"\n{part}", flush=True)
        for name, measure in PARTS[part](kernel, quick):
            if time.perf_counter() - begin > budget_s:
                results["left_out"].append(f"{part}: {name}")
                continue
            try:
                row = measure()
            except Exception as error:  # one kernel that fails must not take the others' rows
                row = {"error": f"{type(error).__name__}: {error}"[:2000]}
            results["rows"][part][name] = row
            write(out, results)
            print(text(part, name, row, peak), flush=True)
    results["seconds"] = time.perf_counter() - begin
    write(out, results)
    if results["left_out"]:
        print(f"\nleft out after {budget_s:.0f} s: {', '.join(results['left_out'])}")
    return results


def main() -> int:
    """Run and say by the exit code whether every row came out."""
    parser = argparse.ArgumentParser(description="Kernels and a sampler on one GPU or TPU")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--budget_s", type=float, default=540.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    if jax.default_backend() == "cpu" and not options.quick:
        raise InputError("no accelerator here: pass --quick to try the benchmark on a CPU")
    results = run(options.parts, out=options.out, budget_s=options.budget_s, quick=options.quick)
    failed = any("error" in row for rows in results["rows"].values() for row in rows.values())
    return 1 if failed or results["left_out"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

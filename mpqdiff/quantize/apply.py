"""Apply a plan: packed integer weights and scales as a pytree, and a `denoise` that uses them.

Every planned site becomes one integer product (int8 x int8 -> int32, dequantised once), and a
convolution one integer convolution; online, an image is what has a scale of its own there, as
patches overlap.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from mpqdiff import intercept
from mpqdiff.costs.bytes import fixed_bytes
from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.kernels import attention_products
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.plan import Plan, runs_in_integers
from mpqdiff.quantize import activations
from mpqdiff.quantize.activations import Table
from mpqdiff.quantize.backends import BACKENDS, check_backend
from mpqdiff.quantize.numerics import quantize_weight
from mpqdiff.quantize.operate import integer_site
from mpqdiff.sites import Site, module_path

quantize_kernel = partial(jax.jit, static_argnames="clip")(quantize_weight)


class QuantizedModel(NamedTuple):
    """`params` (what is passed to the device), `denoise(params, x_t, t, cond)`, and the widths.

    params = {"float": remaining float leaves, "sites": {path: {qvalue, scale, ...}},
    "steps": Table}; a module that is called several times is held once, by its first path.
    """

    params: Any
    denoise: Denoise
    w_bits: dict[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of everything passed to the denoiser besides x_t, t and cond."""
        # Not `nbytes`: that counts a byte for an int4 wherever it is held in half of one.
        return sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(self.params))


def dequantized(kernel, bits, *, clip: str = "mse"):
    """`kernel` rounded to `bits` and back: what the integer product multiplies by."""
    qvalue, scale = quantize_kernel(kernel, bits, clip=clip)
    return qvalue.astype(jnp.float32) * scale


def float_leaves(params, sites: Sequence[Site]):
    """`params` without the kernels and biases of `sites` with weights."""
    flat = traverse_util.flatten_dict(params, sep="/")
    taken = {
        f"{module_path(site.path)}/{leaf}"
        for site in sites
        if site.parameters
        for leaf in ("kernel", "bias")
    }
    return traverse_util.unflatten_dict(
        {name: leaf for name, leaf in flat.items() if name not in taken}, sep="/"
    )


def fixed_cost(params, sites: Sequence[Site], *, rows: int) -> dict[str, float]:
    """Bytes that no choice of widths changes: float leaves and the activation table."""
    leaves = jax.tree.leaves(float_leaves(params, sites))
    left = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    columns = sum(len(taken) for taken in activations.columns(sites).values())
    return fixed_bytes(left, rows, columns)


def site_tensors(kernel, bias, bits: int, *, asymmetric: bool, clip: str) -> dict:
    """Host arrays of one site: qvalue int8 [K,N] (unpacked), scale, bias, colsum where needed."""
    qvalue, scale = jax.device_get(quantize_kernel(kernel, bits, clip=clip))
    qvalue = qvalue.reshape(-1, qvalue.shape[-1])
    tensors = {"qvalue": qvalue, "scale": scale}
    if asymmetric:
        tensors["colsum"] = qvalue.sum(axis=0, dtype=np.int32)
    if bias is not None:
        tensors["bias"] = np.asarray(bias, np.float32)
    return tensors


def quantize(
    params,
    sites: Sequence[Site],
    plan: Plan,
    steps: Table,
    asymmetric: Sequence[bool],
    *,
    clip: str = "mse",
) -> dict[str, dict]:
    """The integer tensors of every module that `plan` quantises, by its first path, on the host and
    unpacked.

    Raises InputError where the calls of one module have different widths.
    """
    return dict(stream(params, sites, plan, asymmetric, clip=clip))


def stream(
    params, sites: Sequence[Site], plan: Plan, asymmetric: Sequence[bool], *, clip: str = "mse"
) -> Iterator[tuple[str, dict]]:
    """What `quantize` gives, one (path, tensors) after the other: `store.save` packs each as it
    comes, so that the integers are never there all at once."""
    flat = traverse_util.flatten_dict(params, sep="/")
    lopsided: dict[str, bool] = {}
    for site, flag in zip(sites, asymmetric, strict=True):
        path = module_path(site.path)
        lopsided[path] = lopsided.get(path, False) or bool(flag)
    for path, bits in _widths(plan, sites).items():
        yield (
            path,
            site_tensors(
                flat[f"{path}/kernel"],
                flat.get(f"{path}/bias"),
                bits,
                asymmetric=lopsided[path],
                clip=clip,
            ),
        )


def _widths(plan: Plan, sites: Sequence[Site]) -> dict[str, int]:
    """The width of every module that `plan` quantises, by its first path, in order.

    Raises InputError where its calls differ, in their widths or in being quantised at all.
    """
    decided = {site.path for site in plan.integer(sites)}
    found: dict[str, int | None] = {}
    for site in sites:
        if not site.parameters:
            continue
        path = module_path(site.path)
        bits = plan.width(site.path) if site.path in decided else None
        if found.setdefault(path, bits) != bits:
            raise InputError(
                f"sites {path!r} and {site.path!r} read the same weights, which are held once: "
                f"w_bits {found[path]} and {bits}; give both the same"
            )
    return {path: bits for path, bits in found.items() if bits is not None}


def build(
    denoise: Denoise,
    params,
    sites: Sequence[Site],
    plan: Plan,
    tensors: Mapping[str, dict],
    steps: Table,
    *,
    backend: str | Mapping[str, str] = "kernels",
) -> QuantizedModel:
    """The runnable model of `tensors` (from `quantize`, or loaded): packed for the device.

    `backend`: a name in BACKENDS, or one for each module of `tensors`, by path. Raises InputError
    as `check_backend` does, and on a site kind that has no integer form.
    """
    named = dict.fromkeys(tensors, backend) if isinstance(backend, str) else backend
    for name in {backend} if isinstance(backend, str) else {*named.values()}:
        check_backend(name)
    ways = {name: BACKENDS[name]() for name in {*named.values()}}
    widths = {path: plan.width(path) for path in tensors}
    packed = {
        path: {**entry, "qvalue": ways[named[path]][0](entry["qvalue"], widths[path])}
        for path, entry in tensors.items()
    }
    left = float_leaves(params, plan.integer(sites))
    params = {"float": left, "sites": packed, "steps": steps}
    shapes = {path: entry["qvalue"].shape for path, entry in tensors.items()}
    multiply = {
        path: (partial(ways[name][1], bits=widths[path], shape=shapes[path]), ways[name][2])
        for path, name in named.items()
    }
    whole = backend if isinstance(backend, str) else None
    attention = whole if whole in attention_products.IMPLEMENTATIONS else None
    integer = integer_denoise(denoise, sites, multiply, a_bits=plan.a_bits, attention=attention)
    return QuantizedModel(jax.tree.map(jnp.asarray, params), integer, widths)


def integer_denoise(
    denoise: Denoise,
    sites: Sequence[Site],
    multiply: Mapping[str, tuple[Callable, Callable]],
    *,
    a_bits: dict[str, Any],
    attention: str | None = None,
) -> Denoise:
    """`denoise` over params = {"float", "sites", "steps"}, in integers where `a_bits` has widths.
    `multiply` has (what opens its weights, what multiplies by them) of each module of
    params["sites"].

    The row of the activation table is looked up once per call, by t, and bound to the sites: the
    interceptor itself does not see the step.
    """
    columns = activations.columns(sites)

    def integer(params, x_t, t, cond):
        online = not params["steps"].timesteps.size
        # Held apart: XLA would repeat the lookup inside every elementwise loop that scales.
        row = None if online else lax.optimization_barrier(activations.row(params["steps"], t))

        def operate(site, module, *args):
            path = module_path(site.path)
            open_, matmul = multiply.get(path, (None, quantized_matmul))
            return integer_site(
                site,
                module,
                args,
                params["sites"].get(path),
                row,
                columns[site.path],
                a_bits[site.path],
                open_=open_,
                matmul=matmul,
                attention=attention,
            )

        operations = {
            site.path: partial(operate, site)
            for site in sites
            if runs_in_integers(a_bits[site.path])
        }
        return intercept.rewrite(denoise, operations)(params["float"], x_t, t, cond)

    return integer

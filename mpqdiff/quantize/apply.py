"""Apply a plan: packed integer weights and scales as a pytree, and a `denoise` that uses them.

Every planned site becomes one integer product (int8 x int8 -> int32, dequantised once), and a
convolution one integer convolution; online, an image is what has a scale of its own there, as
patches overlap.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from mpqdiff import intercept
from mpqdiff.costs.bytes import fixed_bytes
from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels import attention_products
from mpqdiff.kernels.gpu import require_gpu
from mpqdiff.kernels.quantize_activations.reference import token_scale
from mpqdiff.kernels.quantized_conv import pads, quantized_conv
from mpqdiff.kernels.quantized_conv.patches import patches, surround
from mpqdiff.kernels.quantized_conv.reference import image_scale
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.kernels.tpu import require_tpu
from mpqdiff.plan import Plan, runs_in_integers
from mpqdiff.quantize import activations
from mpqdiff.quantize.activations import Table
from mpqdiff.quantize.numerics import quantize_activation, quantize_weight
from mpqdiff.quantize.pack import pack, unpack
from mpqdiff.sites import Site, module_path

# The equations that have an operation of their own, letters by their first appearance.
ATTENTION = {
    "abcd,aecd->acbe": attention_products.qk,
    "abcd,adbe->acbe": attention_products.pv,
}

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


def integer_site(
    site: Site,
    module,
    args,
    tensors,
    row,
    columns,
    bits,
    *,
    open_=None,
    matmul=quantized_matmul,
    attention: str | None = None,
):
    """The integer product of one call `module(*args)` of `site`: float in, float out.

    tensors: qvalue (what `open_` turns into int8 [K,N]), scale, and colsum and bias where there
    are any; row: scales and zero points [..., A] of this step, or None for online ones; columns:
    the site's own of the A; bits: `a_bits` of a plan, which may be traced; attention: the
    implementation of attention products (`kernels.attention_products`).
    """
    if site.kind == "product":
        return _activation_product(site, module, args, row, columns, bits, attention)
    (x,) = args
    if site.kind == "conv":
        matmul = partial(_convolve, matmul, geometry=geometry(module))
    scale, zero = _scales(site.path, x, row, columns[0])
    return matmul(
        x,
        open_(tensors["qvalue"]) if open_ else tensors["qvalue"],
        scale,
        zero if "colsum" in tensors else None,
        tensors["scale"],
        tensors.get("colsum"),
        tensors.get("bias"),
        x_bits=bits,
    )


def _activation_product(site, module, args, row, columns, bits, implementation=None):
    """An attention product by its own operation, in `implementation`; any other as an einsum."""
    widths = bits["lhs"], bits["rhs"]
    (scale, zero), (other, _) = (
        _scales(site.path, x, row, column) for x, column in zip(args, columns, strict=True)
    )
    attention = ATTENTION.get(_spelled(module.equation))
    if attention:
        return attention(*args, scale, zero, other, bits=widths, implementation=implementation)
    if scale is None or other is None:  # online: one for all, as any axis may be summed
        scale, other = (
            token_scale(x.reshape(-1), width)[0] for x, width in zip(args, widths, strict=True)
        )
    left = quantize_activation(args[0], scale, 0 if zero is None else zero, widths[0])
    right = quantize_activation(args[1], other, 0, widths[1])
    acc = jnp.einsum(module.equation, left, right, preferred_element_type=jnp.int32)
    by_image = (-1,) + (1,) * (acc.ndim - 1)
    if zero is not None:
        point = jnp.reshape(zero, by_image).astype(jnp.int32)
        acc = acc - point * _column_sums(module.equation, left, right)
    return acc * (jnp.ravel(scale) * jnp.ravel(other)).reshape(by_image)


def _spelled(equation: str) -> str:
    """An einsum's equation in the letters a, b, c, ... by their first appearance."""
    letters = list(dict.fromkeys(filter(str.isalpha, equation)))
    return equation.translate({ord(letter): ord("a") + i for i, letter in enumerate(letters)})


def _column_sums(equation: str, left, right):
    """What each unit of a zero point adds to einsum(equation, left, right): int32, broadcastable
    to it. A sum over the left operand's rows would repeat itself, so it is given one row."""
    operands, out = equation.split("->")
    letters, others = operands.split(",")
    sizes = zip(letters, left.shape, strict=True)
    shape = [1 if letter in out and letter not in others else size for letter, size in sizes]
    ones = jnp.ones(shape, jnp.int8)
    return jnp.einsum(equation, ones, right, preferred_element_type=jnp.int32)


def _scales(path: str, x, row, column: int):
    """(scale, zero point) of operand x from the step's row; (None, None), each token's own (each
    image's of a convolution), taken by the product, where there is none."""
    if row is None:
        return None, None
    return tuple(_against(value[..., column], x, path) for value in row)


def _against(value, x, path: str):
    """A row's entry ([] or one per sample [B]) shaped to scale x [B, ...]."""
    if not value.ndim:
        return value
    if value.shape[0] != x.shape[0]:
        raise InputError(
            f"site {path!r}: {value.shape[0]} timesteps for {x.shape[0]} rows; a model that folds "
            "other axes into the batch must be called with one timestep, t of shape []"
        )
    return value.reshape((-1,) + (1,) * (x.ndim - 1))


def geometry(module: nn.Conv) -> dict[str, Any]:
    """kernel_size, strides and padding of a convolution, as `quantized_conv` takes them.

    Raises InputError on a convolution that has no integer form.
    """
    size, strides = _pair(module.kernel_size), _pair(module.strides)
    plain = _pair(module.kernel_dilation) == _pair(module.input_dilation) == (1, 1)
    padding = module.padding
    zeros = not isinstance(padding, str) or padding in ("SAME", "SAME_LOWER", "VALID")
    if len(size) != 2 or module.feature_group_count != 1 or not plain or not zeros:
        raise InputError(
            f"conv {'/'.join(module.path)}: only ungrouped, undilated, zero-padded 2-D "
            "convolutions run in integers; leave this one in float (null widths in the plan)"
        )
    if not isinstance(padding, str):
        sides = [padding] * 2 if isinstance(padding, int) else list(padding)
        padding = [(side, side) if isinstance(side, int) else tuple(side) for side in sides]
    return {"kernel_size": size, "strides": strides, "padding": padding}


def _pair(value) -> tuple[int, ...]:
    """Flax's `None | int | sequence` as a pair."""
    if value is None:
        return (1, 1)
    return (value, value) if isinstance(value, int) else tuple(value)


def _convolve(matmul: Callable, x, weight, scale, *rest, geometry: Mapping[str, Any], x_bits):
    """`quantized_conv`, or by patches for a back end that has only a `matmul`."""
    if matmul is quantized_matmul:
        return quantized_conv(x, weight, scale, *rest, **geometry, x_bits=x_bits)
    scale = image_scale(x, x_bits) if scale is None else scale
    padded = surround(x, pads(x.shape[1:3], **geometry))
    rows = patches(padded, geometry["kernel_size"], geometry["strides"])
    return matmul(rows, weight, scale, *rest, x_bits=x_bits)


def _kernels_backend():
    def open_(packed, *, bits, shape):
        return unpack(packed, bits, shape)

    return pack, open_, quantized_matmul


def check_backend(backend: str) -> None:
    """Raises InputError on a back end that is unknown, or that cannot run on this machine."""
    if backend not in BACKENDS:
        raise unknown_name("back end", backend, BACKENDS)
    if backend == "pallas_tpu":
        require_tpu("quantize.backend")
    if backend == "pallas_gpu":
        require_gpu("quantize.backend")


def _packed_backend(implementation: str):
    """Packed weights go to the kernel `implementation` as they are, with their width."""

    def matmul(x, held, scale, *rest, x_bits):
        packed, bits = held
        return quantized_matmul(
            x, packed, scale, *rest, x_bits=x_bits, w_bits=bits, implementation=implementation
        )

    return pack, lambda packed, *, bits, shape: (packed, bits), matmul


def _aqt_backend():
    from mpqdiff.quantize import aqt  # the one import site; AQT is slow to import

    return aqt.hold, aqt.open_, aqt.aqt_matmul


def _transposed_backend(implementation: str):
    """The same with packed weights held transposed, as the GPU kernel reads them: XLA drops the
    two transposes."""
    _, open_, matmul = _packed_backend(implementation)

    def hold(qvalue, bits):
        return np.ascontiguousarray(pack(qvalue, bits).T)

    return hold, lambda held, *, bits, shape: open_(held.T, bits=bits, shape=shape), matmul


MEASURED = "measured"  # of a recipe: each site's own, the quickest (`seconds.backends`)

# How a back end holds integer weights, opens them inside the program, and multiplies. "kernels" is
# XLA's integer product, which runs everywhere; the others are named by their implementation.
BACKENDS = {
    "kernels": _kernels_backend,
    "pallas_tpu": partial(_packed_backend, "pallas_tpu"),
    "pallas_gpu": partial(_transposed_backend, "pallas_gpu"),
    "pallas_interpret": partial(_packed_backend, "pallas_interpret"),
    "pallas_gpu_interpret": partial(_transposed_backend, "pallas_gpu_interpret"),
    "aqt": _aqt_backend,
}
